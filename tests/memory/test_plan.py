"""`rewurst plan` on the configs that `fit` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewurst.preparation.text import train_tokenizer
from rewurst.train import main

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = ["plan", "--config", str(CONFIGS / "continual" / "demo.yaml")]


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Return the printed lines by their first words."""
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line]
    return {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


def test_a_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, "--memory", "1GiB"]) == 0
    found = lines(capsys)
    assert "CausalLM, 1.3M parameters, adamw, fp32; 16 samples per device (input_ids 16x129), 16 in total" in found
    plain, recomputed = (float(value) for value in found["at the peak"])
    assert 0.02 < recomputed < plain < 0.5
    assert found["fits 1 GiB with 10% left"] == ["yes", "yes"]
    assert int(found["largest micro-batch that does"][0]) > 16


def test_devices_and_8_bits(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.init_args.optimizer=adamw_8bit", "--trainer.strategy=rewurst.callbacks.FSDP"]
    assert main([*DEMO, "--devices", "1", "2", "--memory", "10MB", *options]) == 0
    text = capsys.readouterr().out
    assert "1.3M parameters, adamw_8bit, fp32" in text
    assert "2 devices, FSDP over 2, GB" in text
    assert text.count("fits 0.00931 GiB with 10% left") == 2
    assert "largest micro-batch that does" in text


@pytest.mark.parametrize("stage", ["stage_a", "stage_b", "stage_c"])
def test_stages(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {
        "stage_a": ["vqgan=tiny", "discriminator=tiny", "perceptual_weight=0"],
        "stage_b": ["unet=tiny", "compressor=tiny"],
        "stage_c": ["prior=tiny"],
    }[stage]
    config = ["plan", "--config", str(CONFIGS / "wuerstchen" / "one_gpu" / f"{stage}.yaml"), "--memory", "24GiB"]
    if stage == "stage_c":
        assert main(config) == 2
        assert "the image size is unknown: give --image_size" in capsys.readouterr().err
        config += ["--image_size", "256"]
    assert main([*config, *(f"--model.init_args.{option}" for option in tiny)]) == 0
    found = lines(capsys)
    assert float(found["averages and frozen networks"][0]) >= 0
    assert found["fits 24 GiB with 10% left"] == ["yes", "yes"]


@pytest.mark.parametrize(("stage", "latents"), [("stage_c", "z 32x4x2x2"), ("single_stage", "a 32x4x16x16")])
def test_text_encoders_that_are_trained(
    stage: str, latents: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("a red circle above a blue square\n" * 9)
    train_tokenizer([str(tmp_path / "texts.txt")], 260, tmp_path / "tokenizer", progress=False)
    config = ["plan", "--config", str(CONFIGS / "wuerstchen" / "shapes" / f"{stage}.yaml"), "--memory", "1GiB"]
    tokenizer = f"--model.init_args.text_encoder.tokenizer={tmp_path / 'tokenizer'}"
    assert main([*config, "--image_size", "64"]) == 2
    assert "tokenizer data/shapes/tokenizer: no such folder" in capsys.readouterr().err
    assert main([*config, tokenizer]) == 2
    assert "give --image_size, such as 512" in capsys.readouterr().err
    assert main([*config, tokenizer, "--image_size", "64"]) == 0
    text = capsys.readouterr().out
    assert f"Muon, fp32; 32 samples per device ({latents}), 32 in total" in text
    assert "latents are assumed to be prepared\n" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--memory", "80 apples"], "--memory 80 apples is not a size: use one such as 80GiB"),
        (
            ["--trainer.precision=bf16-true"],
            "plan supports precision 32-true, 32, None, bf16-mixed, 16-mixed, not bf16",
        ),
        (["--trainer.max_stepz=3"], "there is no option"),
    ],
)
def test_wrong_use(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, *options]) == 2
    assert expected in capsys.readouterr().err
