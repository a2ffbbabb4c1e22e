"""Exported folders draw the same in diffusers, and are refused if something is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import FAST, array, check_same
from torch import Generator

from rewurst import UsageError
from rewurst.modules.networks import Prior, StageBUNet, weight_files
from rewurst.modules.pipeline.export import export_diffusers
from rewurst.modules.pipeline.text_to_image import TextToImage


class TestDiffusers:
    @pytest.mark.parametrize("guidance", [4.0, 0.0])
    def test_combined_draws_the_same_picture(self, combined: Path, guidance: float) -> None:
        from diffusers import AutoPipelineForText2Image

        theirs = AutoPipelineForText2Image.from_pretrained(combined, trust_remote_code=True)
        for part in (theirs, theirs.prior_pipe, theirs.decoder_pipe):
            part.set_progress_bar_config(disable=True) if part is not theirs else None
        arguments = {"prompt": "a red circle", "height": 128, "width": 256, "prior_guidance_scale": guidance}
        arguments |= {"output_type": "np", "num_images_per_prompt": 2, "negative_prompt": "blue"} | FAST
        expected = theirs(**arguments, generator=Generator().manual_seed(7)).images
        cascade = TextToImage.from_folder(combined)
        ours = array(cascade(**arguments, generator=Generator().manual_seed(7)))
        other = array(cascade(**arguments | {"prompt": "two"}, generator=Generator().manual_seed(7)))
        assert np.abs(ours - other).max() > 1e-2, "the prompt should matter more than the tolerance"
        assert ours.shape == (2, 128, 256, 3)
        check_same(ours, expected)

    def test_other_compressions_draw_the_same_picture(self, pair: Path, pipeline: TextToImage) -> None:
        from diffusers import DiffusionPipeline

        above = DiffusionPipeline.from_pretrained(pair / "prior", trust_remote_code=True)
        below = DiffusionPipeline.from_pretrained(pair / "decoder", trust_remote_code=True)
        assert above.config.resolution_multiple == 16
        assert below.config.latent_dim_scale == 4
        above.set_progress_bar_config(disable=True)
        below.set_progress_bar_config(disable=True)
        generator = Generator().manual_seed(7)
        drawn = above(
            "a red circle", height=64, width=48, num_inference_steps=3, guidance_scale=4.0, generator=generator
        )
        expected = below(
            drawn.image_embeddings,
            "a red circle",
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=generator,
            output_type="np",
        ).images
        ours = pipeline(
            "a red circle",
            64,
            48,
            decoder_guidance_scale=2.0,
            generator=Generator().manual_seed(7),
            output_type="np",
            **FAST,
        )
        check_same(array(ours), expected)

    def test_hub_layout(self, combined: Path, pair: Path, pipeline: TextToImage) -> None:
        """The hub keeps the decoder's pipeline and the prior's in two repositories."""
        ours = TextToImage.from_folder(pair / "decoder", prior=pair / "prior")
        assert ours.resolution_multiple == 16
        drawn = [array(one("x", 64, 64, seed=1, output_type="np", **FAST)) for one in (ours, pipeline)]
        assert np.array_equal(*drawn)

    def test_readme_shows_how_to_load_it(self, combined: Path, pair: Path) -> None:
        assert (
            "AutoPipelineForText2Image.from_pretrained(FOLDER, trust_remote_code=True)"
            in (combined / "README.md").read_text()
        )
        assert 'DiffusionPipeline.from_pretrained(FOLDER + "/prior"' in (pair / "README.md").read_text()

    def test_mean_of_two(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        paths = [checkpoints[name] for name in ("a", "b", "c")]
        export_diffusers(*paths, tmp_path / "out", stage_c_mean=checkpoints["c2"])
        one, two = (Prior.from_checkpoint(checkpoints[name]).state_dict() for name in ("c", "c2"))
        mean = weight_files.read_folder(tmp_path / "out" / "prior" / "prior")
        torch.testing.assert_close(mean, {name: (one[name] + two[name]) / 2 for name in mean})


@pytest.fixture
def broken(combined: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(combined, tmp_path / "broken"))


class TestBadFolders:
    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ("vqgan", "lacks its part vqgan"),
            ("prior_prior", "lacks its part prior_prior"),
            ("prior_tokenizer", "lacks its part prior_tokenizer"),
            ("model_index.json", "does not contain model_index.json: give a folder that rewurst or diffusers wrote"),
            ("decoder/config.json", "does not contain config.json"),
            ("text_encoder/model.safetensors", "cannot be loaded as a CLIP text model"),
        ],
    )
    def test_missing_part(self, part: str, message: str, broken: Path) -> None:
        shutil.rmtree(broken / part) if (broken / part).is_dir() else (broken / part).unlink()
        with pytest.raises(UsageError) as error:
            TextToImage.from_folder(broken)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_decoder_without_prior(self, pair: Path) -> None:
        with pytest.raises(
            UsageError, match="holds a WuerstchenDecoderPipeline only: give the prior pipeline's folder"
        ):
            TextToImage.from_folder(pair / "decoder")

    def test_parts_that_do_not_belong_together(self, broken: Path) -> None:
        Prior.from_preset("tiny", c_in=8).save(broken / "prior_prior")
        with pytest.raises(UsageError, match="Stage B's effnet_embd is 16 but Stage C's c_in is 8"):
            TextToImage.from_folder(broken)

    def test_another_scheduler(self, broken: Path) -> None:
        (broken / "scheduler" / "scheduler_config.json").write_text(json.dumps({"scaler": 2.0, "s": 0.008}))
        with pytest.raises(UsageError, match=r"asks for scaler 2\.0"):
            TextToImage.from_folder(broken)

    def test_nothing_in_a_folder_is_executed(self, broken: Path, tmp_path: Path) -> None:
        for file in broken.rglob("wuerstchen.py"):
            file.write_text(f"open({str(tmp_path / 'trace')!r}, 'w').write('executed')")
        TextToImage.from_folder(broken)
        assert not (tmp_path / "trace").exists()


class TestBadExports:
    def export(self, checkpoints: dict[str, Path], out: Path, **changes: Any) -> None:
        arguments = {"stage_a": checkpoints["a"], "stage_b": checkpoints["b"], "stage_c": checkpoints["c"], "out": out}
        export_diffusers(**(arguments | changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"stage_a": "b"}, "contains StageBUNet, SemanticCompressor: give a checkpoint with a VQGAN"),
            ({"stage_c": "a"}, "contains VQGAN: give a checkpoint with a Prior"),
            ({"text_encoder": Path("/nowhere")}, "/nowhere is not a folder"),
        ],
    )
    def test_wrong_stage(self, changes: Any, message: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        named = {key: checkpoints.get(value, value) for key, value in changes.items()}
        with pytest.raises(UsageError) as error:
            self.export(checkpoints, tmp_path / "out", **named)
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_taken_folder(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(UsageError, match="exists already: give a new folder"):
            self.export(checkpoints, tmp_path)

    def test_no_text_encoder(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        StageBUNet.from_preset("tiny").save(tmp_path / "b")
        Prior.from_preset("tiny").save(tmp_path / "c")
        with pytest.raises(UsageError, match="names no text encoder: give text_encoder, a hub name or a folder"):
            self.export(checkpoints, tmp_path / "out", stage_b=tmp_path / "b", stage_c=tmp_path / "c")
