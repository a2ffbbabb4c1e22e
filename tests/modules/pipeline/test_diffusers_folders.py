"""Diffusers' folders in every variant and in shards draw the pictures that diffusers draws."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewurst import UsageError
from rewurst.modules import TextToImage
from rewurst.modules.networks import Prior, TextEncoder

CALL: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_inference_steps": 2,
    "prior_num_inference_steps": 2,
    "output_type": "np",
}
SAVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16": {"variant": "fp16"},
    "sharded": {"max_shard_size": "300KB"},
    "sharded fp16": {"max_shard_size": "300KB", "variant": "fp16"},
    "bin": {"safe_serialization": False},
    "sharded bin": {"max_shard_size": "300KB", "safe_serialization": False},
    "sharded bin of a variant": {"max_shard_size": "300KB", "safe_serialization": False, "variant": "ema"},
}


@pytest.fixture(scope="module")
def theirs(text_encoder_folder: Path) -> Any:
    """Build the pipeline of diffusers' fast tests: Stage B sees no embedding, so its width does not matter."""
    wuerstchen = pytest.importorskip("diffusers.pipelines.deprecated.wuerstchen")
    from diffusers import DDPMWuerstchenScheduler
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(text_encoder_folder)
    encoders = [CLIPTextModel.from_pretrained(text_encoder_folder) for _ in range(2)]
    torch.manual_seed(0)
    return wuerstchen.WuerstchenCombinedPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders[0],
        prior_tokenizer=tokenizer,
        prior_text_encoder=encoders[1],
        prior_prior=wuerstchen.WuerstchenPrior(c_in=2, c=8, depth=2, c_cond=32, c_r=8, nhead=2).eval(),
        decoder=wuerstchen.WuerstchenDiffNeXt(
            c_cond=32,
            c_hidden=[320],
            nhead=[-1],
            blocks=[1],
            level_config=["CT"],
            clip_embd=32,
            inject_effnet=[False],
        ).eval(),
        vqgan=wuerstchen.PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2).eval(),
        scheduler=DDPMWuerstchenScheduler(),
        prior_scheduler=DDPMWuerstchenScheduler(),
    )


@pytest.fixture(scope="module")
def drawn(theirs: Any) -> Any:
    theirs.set_progress_bar_config(disable=True)
    return theirs("a cat", generator=torch.Generator().manual_seed(0), **CALL).images


@pytest.mark.parametrize("name", SAVED)
def test_folders_of_every_form_draw_diffusers_pictures(name: str, theirs: Any, drawn: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path, **SAVED[name])
    pipeline = TextToImage.from_folder(tmp_path)
    found = pipeline("a cat", generator=torch.Generator().manual_seed(0), **CALL)
    np.testing.assert_allclose(found.images, drawn, atol=1e-4)  # type: ignore[union-attr]


def test_a_variant_is_chosen_by_name(theirs: Any, tmp_path: Path) -> None:
    theirs.prior_prior.save_pretrained(tmp_path, variant="ema")
    half = type(theirs.prior_prior).from_pretrained(tmp_path, variant="ema").half()
    half.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(UsageError, match="has the variants ema, fp16 and no plain weights: choose one with variant"):
        Prior.from_folder(tmp_path)
    assert next(Prior.from_folder(tmp_path, variant="fp16").parameters()).dtype == torch.float16
    assert next(Prior.from_folder(tmp_path, variant="ema").parameters()).dtype == torch.float32
    theirs.prior_prior.save_pretrained(tmp_path)
    assert next(Prior.from_folder(tmp_path).parameters()).dtype == torch.float32
    assert next(Prior.from_folder(tmp_path, variant="none of them").parameters()).dtype == torch.float32


def test_a_missing_shard_is_named(theirs: Any, tmp_path: Path) -> None:
    theirs.decoder.save_pretrained(tmp_path, max_shard_size="300KB")
    missing = sorted(tmp_path.glob("*00002-of*"))[0]
    missing.unlink()
    from rewurst.modules.networks import StageBUNet

    with pytest.raises(UsageError, match=missing.name):
        StageBUNet.from_folder(tmp_path)


def test_a_text_encoder_of_a_variant(text_encoder_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(text_encoder_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    expected = TextEncoder.from_pretrained(text_encoder_folder).encode(["a cat"])
    torch.testing.assert_close(TextEncoder.from_pretrained(tmp_path).encode(["a cat"]), expected)


def test_callbacks_see_and_change_what_those_of_diffusers_do(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    ours = TextToImage.from_folder(tmp_path)
    names = ["latents", "text_encoder_hidden_states", "negative_prompt_embeds"]
    found = []
    for pipeline in (theirs, ours):
        seen: list[dict[str, Any]] = []

        def step(_: Any, number: int, time: Any, tensors: dict[str, Any], seen: Any = seen) -> dict[str, Any]:
            seen.append({name: None if value is None else value.clone() for name, value in tensors.items()})
            changed = {"text_encoder_hidden_states": tensors["text_encoder_hidden_states"] * 0.5}
            return changed | {"latents": tensors["latents"] + 0.1}

        arguments = CALL | {"negative_prompt": "blue", "decoder_guidance_scale": 2.0}
        pictures = pipeline(
            "a cat",
            generator=torch.Generator().manual_seed(0),
            prior_callback_on_step_end=step,
            prior_callback_on_step_end_tensor_inputs=names,
            callback_on_step_end=step,
            callback_on_step_end_tensor_inputs=[*names, "image_embeddings"],
            **arguments,
        ).images
        found.append((pictures, seen))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-4)
    assert len(found[0][1]) == len(found[1][1]) == 4
    for expected, seen in zip(*(steps for _, steps in found), strict=True):
        assert expected.keys() == seen.keys()
        for name, value in expected.items():
            torch.testing.assert_close(seen[name], value, atol=1e-4, rtol=1e-4)


def test_an_unknown_name_of_a_step(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    pipeline = TextToImage.from_folder(tmp_path)
    with pytest.raises(UsageError, match="inputs has 'image_embeddings': choose among latents"):
        pipeline("a", prior_callback_on_step_end_tensor_inputs=["image_embeddings"], **CALL)


def test_arguments_are_those_of_diffusers_in_their_order(theirs: Any) -> None:
    expected = [name for name in inspect.signature(type(theirs).__call__).parameters if name != "kwargs"]
    assert list(inspect.signature(TextToImage.__call__).parameters)[: len(expected)] == expected
