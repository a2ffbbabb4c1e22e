"""Drawing: seeds of any type, devices, non-finite values, and batches that are written at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rewurst import UsageError
from rewurst.modules import TextToImage
from rewurst.modules.networks import VQGAN, Prior, SemanticCompressor, StageBUNet, TextEncoder
from rewurst.train import main

FAST: dict[str, Any] = {"height": 32, "width": 32, "prior_num_inference_steps": 2, "num_inference_steps": 2}


@pytest.fixture
def pipeline(text_encoder_folder: Path) -> TextToImage:
    torch.manual_seed(0)
    networks: list[Any] = [VQGAN.from_preset("tiny"), StageBUNet.from_preset("tiny"), Prior.from_preset("tiny")]
    encoders = [TextEncoder.from_pretrained(text_encoder_folder) for _ in range(2)]
    compressor = SemanticCompressor.from_preset("tiny").eval()
    made = TextToImage(*networks, *encoders, compressor, resolution_multiple=16, latent_dim_scale=4)
    for network in made.networks():
        network.eval()
    return made


def drawn(pipeline: TextToImage, seed: Any, prompt: Any = "x", **changes: Any) -> Any:
    return pipeline(prompt, seed=seed, output_type="np", **FAST | changes).images  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), torch.tensor(3), [3], np.array([3]), (np.int32(3),)])
def test_seeds_of_any_type_of_whole_number(seed: Any, pipeline: TextToImage) -> None:
    np.testing.assert_array_equal(drawn(pipeline, seed), drawn(pipeline, 3))


def test_seeds_of_an_array(pipeline: TextToImage) -> None:
    two = drawn(pipeline, np.arange(4, 6), ["x", "x"])
    np.testing.assert_allclose(two, np.concatenate([drawn(pipeline, 4), drawn(pipeline, 5)]), atol=1e-5)


@pytest.mark.parametrize(
    ("seed", "message"),
    [([1.5], "is wrong: give a whole number"), (["1"], "is wrong"), (2**70, "is too large"), (range(2), "got 2 seeds")],
)
def test_wrong_seeds(seed: Any, message: str, pipeline: TextToImage) -> None:
    with pytest.raises(UsageError, match=message):
        drawn(pipeline, seed)


def test_networks_are_moved_together(pipeline: TextToImage) -> None:
    assert pipeline.to("cpu", torch.float64) is pipeline
    assert {p.dtype for network in pipeline.networks() for p in network.parameters()} == {torch.float64}
    assert np.isfinite(drawn(pipeline, 3)).all()
    assert pipeline.to(torch.float32).device == torch.device("cpu")


def test_offloaded_networks_are_on_the_device_only_while_they_work(
    pipeline: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drawn(pipeline, 3)
    image = Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8))
    reconstructed = pipeline.reconstruct(image, 2, seed=1)
    there: list[nn.Module] = []
    most = 0
    move = nn.Module.to

    def to(self: nn.Module, device: Any) -> nn.Module:
        nonlocal most
        if isinstance(device, torch.device):
            there.append(self)
        else:
            there.remove(self)
        most = max(most, len(there))
        return move(self, device)

    assert pipeline.enable_model_cpu_offload(device="cpu") is pipeline
    for network in pipeline.networks():
        network.register_forward_pre_hook(lambda network, _: None if network in there else pytest.fail("not moved"))
    monkeypatch.setattr(nn.Module, "to", to)
    np.testing.assert_array_equal(drawn(pipeline, 3), expected)
    again = pipeline.reconstruct(image, 2, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(again, reconstructed, strict=True))
    assert (most, there) == (1, [])


@pytest.mark.parametrize("stage", ["prior", "decoder", "vqgan"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_not_written(stage: str, value: float, pipeline: TextToImage) -> None:
    name = {"prior": "Stage C", "decoder": "Stage B", "vqgan": "Stage A"}[stage]
    with torch.no_grad():
        last = list(getattr(pipeline, stage).parameters())[-1]
        last.fill_(value)
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(UsageError, match=f"{name} made values that are not finite, in float32: are its weights"):
            pipeline("x", output_type=output_type, seed=1, **FAST)


class Cheap:
    """Cheap pipeline whose pictures encode prompt and seed."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int]] = []

    def __call__(self, prompts: list[str], height: int, width: int, **arguments: Any) -> Any:
        if len(self.calls) == 2:
            raise UsageError("stopped")
        self.calls.append((prompts, arguments["seed"]))
        shades = range(arguments["seed"], arguments["seed"] + len(prompts))
        return type("Pictures", (), {"images": [Image.new("RGB", (width, height), (shade,) * 3) for shade in shades]})


def test_pictures_are_written_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap = Cheap()
    monkeypatch.setattr(TextToImage, "from_folder", lambda *arguments: cheap)
    (tmp_path / "prompts.txt").write_text("\ufeff" + "".join(f"prompt {i}\n" for i in range(5)), "utf-8")
    out = tmp_path / "new" / "a.png"
    asked = ["folder", f"@{tmp_path / 'prompts.txt'}", "--images", "2", "--batch_size", "4", "--seed", "7"]
    assert main(["generate", "image", *asked, "--out", str(out)]) == 2
    assert cheap.calls == [
        (["prompt 0", "prompt 0", "prompt 1", "prompt 1"], 7),
        (["prompt 2", "prompt 2", "prompt 3", "prompt 3"], 11),
    ]
    for index in range(8):  # of the batches before the failure
        with Image.open(out.with_stem(f"a-{index}")) as image:
            assert image.getpixel((0, 0)) == (7 + index,) * 3
    assert "pictures:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("a.xyz", "a.xyz cannot be written: .xyz is not a format, try .png"),
        ("a", "a cannot be written: no suffix is not a format, try .png"),
        ("folder.png", "folder.png is a folder: give the name of an image file"),
        ("file.txt/a.png", "file.txt is a file"),
        ("file.txt/b/a.png", "file.txt is a file"),
    ],
)
@pytest.mark.parametrize("command", ["image", "reconstruction"])
def test_an_unwritable_folder_is_noticed_first(
    command: str, out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(TextToImage, "from_folder", lambda *arguments: pytest.fail("loaded first"))
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("file.txt").touch()
    assert main(["generate", command, "folder", "a.png", "--out", out]) == 2
    assert message in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "images is 0, expected 1 or more"),
        (["--batch_size", "0"], "batch_size is 0, expected 1 or more"),
        (["--steps", "0"], "steps is 0, expected 1 or more"),
        (["--height", "-1"], "height is -1, expected 1 or more"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used: "),
    ],
)
def test_arguments_are_checked_first(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(TextToImage, "from_folder", lambda *given: pytest.fail("loaded first"))
    assert main(["generate", "image", "folder", "a cat", "--out", str(tmp_path / "a.png"), *arguments]) == 2
    assert message in capsys.readouterr().err
