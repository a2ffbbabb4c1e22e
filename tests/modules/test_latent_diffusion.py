"""Latent diffusion in one stage learns, has the paper's loss, resumes bit for bit, and refuses bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_runs import fit_six_steps, time_of, trainer

from rewurst import UsageError
from rewurst.callbacks import LRRewarming, WarmupCosine
from rewurst.modules import LatentDiffusion
from rewurst.modules.networks import VQGAN, StageBUNet
from rewurst.modules.shared.text_encoder import checkpoint_text_encoder
from rewurst.preparation.tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader is not resumable.*",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:.*in eval mode at the start",
)

LENGTH = 6
UNET: dict[str, Any] = {"preset": "tiny", "c_hidden": [16, 32], "c_cond": 16, "clip_embd": 16}
Data = Callable[..., Any]
Build = Callable[..., LatentDiffusion]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write a small Stage A and a tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    VQGAN.from_preset("tiny", embed_dim=16, num_vq_embeddings=16, scale_factor=0.8).save(folder / "a")
    (folder / "captions.txt").write_text("disc 0 1 2 3 4 5 6 7 8 9 disc disc")
    train_tokenizer([str(folder / "captions.txt")], 270, folder / "tokenizer", progress=False)
    return {"a": str(folder / "a"), "tokenizer": str(folder / "tokenizer")}


@pytest.fixture
def single(parts: dict[str, str]) -> Build:
    def build(**changes: Any) -> LatentDiffusion:
        text = {"tokenizer": parts["tokenizer"], "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "max_position_embeddings": LENGTH}
        torch.manual_seed(0)
        return LatentDiffusion(parts["a"], **{"unet": UNET, "text_encoder": text, "sampling_steps": 3, **changes})

    return build


def test_it_learns_a_few_pictures(picture_data: Data, single: Build, tmp_path: Path) -> None:
    module, data = single(), picture_data(8, 8, pictures=8, val=8, steps=200)
    before = trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)[-1]
    callbacks = [LRRewarming(WarmupCosine(5e-3, 5e-4, 0.1), 100)]
    trainer(tmp_path, max_steps=100, callbacks=callbacks).fit(module, data)
    after = trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)[-1]
    assert after["val/loss/average"] < 0.7 * before["val/loss/average"]


def test_the_loss_is_the_papers(single: Build) -> None:
    """Computed independently, one sample at a time: t, noise, eps = (x - a) / b, p2 = 1 / (1 + snr)."""
    module = single(max_loss_weight=20.0, high_noise_share=0.5)
    module.unet.get_parameter("clf.1.weight").data.normal_(std=0.05)
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    batch = {"image": images, "caption": [f"disc {n}" for n in range(6)], "seed": torch.arange(6)}
    losses = []
    with torch.no_grad():
        for index in range(6):
            generator = torch.Generator().manual_seed(index)
            t = time_of(float(torch.rand(1, generator=generator)), 0.5)
            x = module.stage_a.module.to_latents(images[index : index + 1].float() / 255)
            noise = torch.randn(x.shape, generator=generator)
            angle = np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
            share = float(np.clip(angle**2, 1e-4, 0.9999))
            assert module.text_model is not None
            text = module.text_model([batch["caption"][index]])
            predicted = module.unet(share**0.5 * x + (1 - share) ** 0.5 * noise, torch.tensor([t]), None, text)
            snr = share / (1 - share)
            losses.append(float((predicted - noise).square().mean()) / (1 + snr) * min(max(1 / snr, 1), 20.0))
        assert float(module.training_step(batch, 0)) == pytest.approx(np.mean(losses), rel=1e-4)
        latents = {**batch, "a": module.data_of(batch)}
        del latents["image"]
        torch.testing.assert_close(module.training_step(latents, 0), module.training_step(batch, 0))


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_is_the_whole_one(picture_data: Data, single: Build, tmp_path: Path, stop: int) -> None:
    def fit(name: str, ckpt_path: Path | None = None) -> tuple[dict[str, Any], list[float]]:
        module = single(unet=UNET | {"dropout": 0.2})
        return fit_six_steps(tmp_path, name, module, picture_data(2, 4), ckpt_path)

    whole, losses = fit("whole")
    resumed, rest = fit("resumed", tmp_path / "whole" / f"step={stop}.ckpt")
    assert losses[stop:] == rest
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, resumed[key][name]) for name, tensor in whole[key].items())
    assert {name.split(".")[0] for name in whole["state_dict"]} == {"unet", "text_model"}
    assert whole["frozen"].keys() == {"stage_a"}

    path = str(tmp_path / "whole" / "step=6.ckpt")
    again = single(init_from=path, unet=UNET | {"dropout": 0.2})
    assert all(torch.equal(t, whole["state_dict"][f"unet.{name}"]) for name, t in again.unet.state_dict().items())
    kept = checkpoint_text_encoder(path)
    assert not isinstance(kept, str)
    assert kept is not None
    assert torch.equal(kept.encode(["disc 1"]), again.encode(["disc 1"]))


def test_samples_do_not_depend_on_their_neighbours(picture_data: Data, single: Build, tmp_path: Path) -> None:
    module, data = single(guidance_scale=2.0).eval(), picture_data(3, 3)
    module.unet.get_parameter("clf.1.weight").data.normal_(std=0.05)
    trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)
    batch = next(iter(data.val_dataloader()["seen"]))
    with torch.no_grad():
        pictures = module.draw_samples(batch)
        alone = module.draw_samples({name: value[1:2] for name, value in batch.items()})
        cached = {name: value for name, value in batch.items() if name != "image"} | {"a": module.data_of(batch)}
        from_cached = module.draw_samples(cached)
        module.guidance_scale = 1.0
        unguided = module.draw_samples(batch)
    assert list(pictures) == ["original", "A", "drawn"]
    assert list(from_cached) == ["A", "drawn"]
    torch.testing.assert_close(from_cached["drawn"], pictures["drawn"])
    assert not torch.allclose(unguided["drawn"], pictures["drawn"], atol=1e-3)
    for name, picture in pictures.items():
        assert picture.shape == batch["image"].shape
        torch.testing.assert_close(picture[1:2], alone[name], rtol=1e-4, atol=1e-4)


def test_the_unet_needs_no_embedding_if_no_level_uses_it() -> None:
    torch.manual_seed(0)
    blind = StageBUNet.from_preset("tiny", inject_effnet=[False, False])
    x, t, text = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 32)
    assert torch.equal(blind(x, t, None, text), blind(x, t, torch.randn(2, 16, 1, 1), text))
    with pytest.raises(ValueError, match="effnet is None"):
        StageBUNet.from_preset("tiny")(x, t, None, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": "huge"}, "StageBUNet has no preset 'huge'"),
        ({"unet": UNET | {"inject_effnet": [False, True]}}, r"inject_effnet is \[False, True\]: nothing is injected"),
        ({"unet": UNET | {"c_in": 3}}, "unet's c_in is 3 but stage_a's latent_channels is 4: set c_in to that"),
        ({"unet": UNET | {"clip_embd": 3}}, "unet's clip_embd is 3 but the text encoder's width is 16"),
        ({"high_noise_share": 1.5}, r"high_noise_share 1.5 must be in \[0, 1\]"),
        ({"high_noise_steps": -1}, "high_noise_steps -1 must be at least 0"),
        ({"max_loss_weight": 0.5}, "max_loss_weight 0.5 must be at least 1"),
    ],
)
def test_bad_arguments(single: Build, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        single(**changes)


def test_other_latents_are_refused(single: Build, picture_data: Data, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prepare latents with --what z,a"):
        single().data_of({"z": torch.zeros(1), "caption": ["disc"]})
    data = picture_data()
    data.made_by = {"stage_a": {"sha256": "another", "source": "there", "corpus": "shapes"}}
    with pytest.raises(UsageError, match=r"stage_a of .* did not make the latents of shapes"):
        trainer(tmp_path, max_steps=1).fit(single(), data)
