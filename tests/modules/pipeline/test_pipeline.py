"""TextToImage with prompts, images and the command line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import FAST, array
from torch import Generator, nn

from rewurst import UsageError
from rewurst.datamodules.imaging.decoding import decode
from rewurst.modules.networks import VQGAN, Prior, StageBUNet
from rewurst.modules.pipeline.prompts import read_prompts
from rewurst.modules.pipeline.text_to_image import TextToImage
from rewurst.train import main


class TestCall:
    def test_output_types(self, pipeline: TextToImage) -> None:
        arguments = {"prompt": ["a circle", "a square"], "height": 32, "width": 48, "seed": 3} | FAST
        pil = pipeline(**arguments).images
        assert [image.size for image in pil] == [(48, 32)] * 2
        tensor = pipeline(**arguments, output_type="pt").images
        assert tensor.shape == (2, 3, 32, 48)
        assert 0 <= tensor.min() < tensor.max() <= 1
        assert np.array_equal(np.asarray(pil[1]), (tensor[1].permute(1, 2, 0) * 255).round().byte().numpy())
        assert pipeline(**arguments, output_type="latent", return_dict=False)[0].shape == (2, 4, 8, 12)

    def test_the_same_seed_gives_the_same_picture(self, pipeline: TextToImage) -> None:
        one, same, other = (array(pipeline("x", 32, 32, seed=seed, output_type="np", **FAST)) for seed in (5, 5, 6))
        assert np.array_equal(one, same)
        assert not np.allclose(one, other, atol=1e-3)

    def test_batches_equal_singles(self, pipeline: TextToImage) -> None:
        arguments = {"height": 32, "width": 32, "output_type": "np", "decoder_guidance_scale": 1.5} | FAST
        prompts, negatives = ["a red circle", "two"], ["", "green"]
        together = array(
            pipeline(prompts, negative_prompt=negatives, num_images_per_prompt=2, seed=[4, 9, 1, 2], **arguments)
        )
        for index, seed in enumerate([4, 9, 1, 2]):
            prompt, negative = prompts[index // 2], negatives[index // 2]
            alone = array(pipeline(prompt, negative_prompt=negative, seed=seed, **arguments))
            assert np.abs(alone[0] - together[index]).max() < 1e-4

    def test_one_seed_counts_up(self, pipeline: TextToImage) -> None:
        two = array(pipeline("x", 32, 32, num_images_per_prompt=2, seed=5, output_type="np", **FAST))
        second = array(pipeline("x", 32, 32, seed=6, output_type="np", **FAST))
        assert np.abs(two[1] - second[0]).max() < 1e-4

    def test_prompt_embeds(self, pipeline: TextToImage) -> None:
        states = pipeline.prior_text_encoder.encode(["a circle"])
        arguments = {"height": 32, "width": 32, "output_type": "np", "seed": 1} | FAST
        one = array(pipeline(prompt_embeds=states, **arguments))
        assert one.shape == (1, 32, 32, 3)
        changed = array(pipeline(prompt_embeds=-states, **arguments))
        assert not np.array_equal(one, changed)

    def test_latents_and_timesteps(self, pipeline: TextToImage) -> None:
        noise = torch.randn(1, 16, 2, 2)
        arguments = {"prompt": "x", "height": 32, "width": 32, "latents": noise, "output_type": "np", "seed": 1}
        schedules = {"prior_timesteps": [1.0, 0.6, 0.0], "decoder_timesteps": [1.0, 0.0]}
        assert np.array_equal(array(pipeline(**arguments, **schedules)), array(pipeline(**arguments, **schedules)))

    def test_callbacks_and_progress(self, pipeline: TextToImage, capsys: pytest.CaptureFixture[str]) -> None:
        seen: list[tuple[str, int]] = []

        def above(pipe: Any, step: int, time: float, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            seen.append(("c", step))
            return {"latents": tensors["latents"] * 0}

        def below(pipe: Any, step: int, time: float, tensors: dict[str, torch.Tensor]) -> None:
            assert pipe is pipeline
            seen.append(("b", step))

        pipeline("x", 32, 32, prior_callback_on_step_end=above, callback_on_step_end=below, progress=True, **FAST)
        assert seen == [("c", 0), ("c", 1), ("c", 2), ("b", 0), ("b", 1)]
        bars = capsys.readouterr().err
        assert "Stage C: 100%" in bars
        assert "Stage B: 100%" in bars

    def test_bfloat16_is_close(self, pair: Path, pipeline: TextToImage) -> None:
        half = TextToImage.from_folder(pair, dtype=torch.bfloat16)
        assert all(parameter.dtype == torch.bfloat16 for part in half.networks() for parameter in part.parameters())
        latents = half("x", 32, 32, seed=1, output_type="latent", **FAST).images
        assert isinstance(latents, torch.Tensor)
        assert latents.dtype == torch.float32
        drawn = [array(one("x", 32, 32, seed=1, output_type="np", **FAST)) for one in (half, pipeline)]
        assert np.abs(drawn[0] - drawn[1]).mean() < 0.1

    def test_long_prompts_are_reported(self, pipeline: TextToImage) -> None:
        with pytest.warns(UserWarning, match="has 42 tokens, of which 16 are used"):
            pipeline("z" * 40, 32, 32, **FAST)


def test_released_sizes() -> None:
    with torch.device("meta"):
        networks = [network.from_preset("released") for network in (VQGAN, StageBUNet, Prior)]
    released = TextToImage(*networks, text_encoder=nn.Module(), prior_text_encoder=nn.Module())  # type: ignore[arg-type]
    assert [pixels for pixels in range(1, 2049) if released.fits(pixels)] == list(range(128, 2049, 128))


def _pictures(folder: Path) -> list[Path]:
    """Write files like those of phones and editors: rotated, transparent, 16-bit, palette, CMYK, one-bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 50, 4), dtype=np.uint8)
    rgba, rgb = Image.fromarray(pixels, "RGBA"), Image.fromarray(pixels[..., :3])
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb.save(folder / "phone.jpg", exif=turned)
    rgba.save(folder / "rgba.png")
    Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0]).save(folder / "16bit.png")
    rgb.quantize(16).save(folder / "palette.png", transparency=3)
    rgb.convert("CMYK").save(folder / "print.jpg")
    rgba.convert("LA").save(folder / "grey.png")
    rgb.convert("1").save(folder / "bits.png")
    return sorted(folder.iterdir())


class TestReconstruct:
    def test_sizes(self, pair: Path) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
        pipeline = TextToImage.from_folder(pair)
        result = pipeline.reconstruct(image, num_inference_steps=2, seed=1)
        assert [image.size for image in result] == [(48, 64)] * 3
        again = pipeline.reconstruct(image, num_inference_steps=2, seed=1)
        assert all(np.array_equal(one, other) for one, other in zip(result, again, strict=True))

    def test_files_are_read_as_in_training(self, pair: Path, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        for path in _pictures(tmp_path / "in"):
            out = tmp_path / "row.png"
            assert main(["generate", "reconstruction", str(pair), str(path), "--steps", "1", "--out", str(out)]) == 0
            trained = decode(path.read_bytes())
            height, width = trained.shape[0] // 16 * 16, trained.shape[1] // 16 * 16
            top, left = (trained.shape[0] - height) // 2, (trained.shape[1] - width) // 2
            with Image.open(out) as row:
                assert row.size == (3 * width, height)
                shown = np.asarray(row)[:, :width]
            np.testing.assert_array_equal(shown, trained[top : top + height, left : left + width], err_msg=path.name)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("none.png", "none.png cannot be read as an image (No such file or directory): give a .png, .jpg"),
            ("text.png", "text.png cannot be read as an image (not a JPEG, PNG, WebP or GIF"),
            ("small.png", "the image is 9x9 pixels: it needs at least 16 each way"),
        ],
    )
    def test_bad_files(
        self, name: str, message: str, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "text.png").write_text("no image")
        Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
        out = str(tmp_path / "out.png")
        assert main(["generate", "reconstruction", str(pair), str(tmp_path / name), "--out", out]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "I;16"])
    def test_images_that_training_would_convert_are_refused(self, mode: str, pipeline: TextToImage) -> None:
        with pytest.raises(UsageError, match=r"the image has mode \S+ and EXIF orientation 1, expected upright RGB"):
            pipeline.reconstruct(Image.new(mode, (32, 32)))

    def test_a_rotated_image_is_refused(self, pipeline: TextToImage) -> None:
        turned = Image.new("RGB", (32, 32))
        turned.getexif()[0x0112] = 6
        with pytest.raises(UsageError, match="mode RGB and EXIF orientation 6"):
            pipeline.reconstruct(turned)

    def test_without_compressor(self, pipeline: TextToImage) -> None:
        bare = copy.copy(pipeline)
        bare.compressor = None
        with pytest.raises(UsageError, match="this model has no compressor"):
            bare.reconstruct(Image.new("RGB", (32, 32)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt": "x", "height": 50},
            "height=50 does not fit this model's stages: the nearest that fit are 48 or 64",
        ),
        ({"prompt": "x", "width": -1}, "width=-1 does not fit this model's stages: the nearest that fit are 16 or 32"),
        ({}, "give either prompt or prompt_embeds"),
        ({"prompt": []}, "prompt=[] is not text: give a string or a list of strings"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "got 2 negative prompts for 3 prompts"),
        ({"prompt": "x", "num_images_per_prompt": 0}, "num_images_per_prompt=0 is too few: give at least 1"),
        ({"prompt": "x", "prompt_embeds": torch.zeros(1, 16, 32)}, "give either prompt or prompt_embeds"),
        (
            {"prompt_embeds": torch.zeros(1, 16, 8)},
            "text states have shape (1, 16, 8): this call and model need (1, 16, 32)",
        ),
        ({"prompt": "x", "negative_prompt_embeds": torch.zeros(2, 16, 32)}, "text states have shape (2, 16, 32)"),
        ({"prompt": "x", "seed": [1, 2]}, "got 2 seeds for 1 images"),
        ({"prompt": "x", "seed": 1, "generator": Generator()}, "give either seed or generator"),
        ({"prompt": "x", "output_type": "jpg"}, "output_type='jpg' is unknown"),
        ({"prompt": "x", "prior_num_inference_steps": 0}, "prior_num_inference_steps=0 is too few"),
        ({"prompt": "x", "prior_timesteps": [0.0, 1.0]}, "timesteps [0.0, 1.0] are invalid"),
        (
            {"prompt": "x", "latents": torch.zeros(1, 16, 9, 9)},
            "latents have shape (1, 16, 9, 9): this prompt and size",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, pipeline: TextToImage) -> None:
    with pytest.raises(UsageError) as error:
        pipeline(**{"height": 32, "width": 32, **FAST, **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n two dogs \n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert read_prompts("a cat") == ["a cat"]
    assert read_prompts(f"@{tmp_path / 'p.txt'}") == ["a cat", "two dogs"]
    for name, message in (("none", "cannot be read"), ("empty", "holds no prompt"), ("binary", "cannot be read")):
        with pytest.raises(UsageError, match=f"{name}.txt {message}.*: give a text file with one prompt a line"):
            read_prompts(f"@{tmp_path / name}.txt")


class TestCommandLine:
    def test_export_draw_and_reconstruct(
        self, checkpoints: dict[str, Path], pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "exported"
        stages = [f"--stage_{stage}={checkpoints[stage]}" for stage in "abc"]
        assert main(["export", "diffusers", *stages, str(out)]) == 0
        assert capsys.readouterr().out.strip().endswith("its README.md says how to load it")
        exported = sorted(path.relative_to(out) for path in out.rglob("*.safetensors"))
        assert exported == sorted(path.relative_to(pair) for path in pair.rglob("*.safetensors"))

        size = ["--height", "64", "--width", "96", "--prior_steps", "3", "--steps", "2", "--seed", "5"]
        drawn = tmp_path / "pictures" / "a.png"
        assert main(["generate", "image", str(out), "a red circle", "--images", "2", *size, "--out", str(drawn)]) == 0
        expected = TextToImage.from_folder(pair)("a red circle", 64, 96, num_images_per_prompt=2, seed=5, **FAST)
        for index, picture in enumerate(expected.images):  # type: ignore[union-attr]
            with Image.open(drawn.with_stem(f"a-{index}")) as image:
                assert np.array_equal(np.asarray(image), np.asarray(picture))

        row = tmp_path / "row.png"
        image = str(drawn.with_stem("a-0"))
        assert main(["generate", "reconstruction", str(out), image, "--steps", "2", "--out", str(row)]) == 0
        with Image.open(row) as opened:
            assert opened.size == (3 * 96, 64)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["export", "diffusers", "--stage_a=a", "--stage_b=b", "--stage_c=no.ckpt", "out"],
                "no.ckpt is not a file",
            ),
            (["export", "diffusers", "--stage_a=a", "out"], "arguments are required: --stage_b, --stage_c"),
            (["generate", "image", "nowhere", "a", "--out", "a.png"], "nowhere"),
            (["generate", "image", "nowhere", "@no.txt", "--out", "a.png"], "no.txt cannot be read"),
            (["generate", "reconstruction", "nowhere", "a.png", "--out", "b.png"], "nowhere"),
        ],
    )
    def test_wrong_use(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
        assert list(tmp_path.iterdir()) == []
