"""The comparison of cascade and single stage from end to end, in few steps of small networks; and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewurst import UsageError
from rewurst.datamodules.prepare_images import prepare_images
from rewurst.reproduce.wuerstchen import study
from rewurst.reproduce.wuerstchen.study import Options, reproduce
from rewurst.train import main

SHAPES = Path(__file__).parents[2] / "configs" / "wuerstchen" / "shapes"
STEPS = {"stage_a": 4, "stage_b": 4, "stage_c": 8, "single_stage": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
UNET = {"c_cond": 16, "clip_embd": 16, "dropout": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "stage_a": {"vqgan": {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 16}},
    "stage_b": {
        "unet": {"preset": "tiny", "c_hidden": [8, 16], "c_cond": 16, "effnet_embd": 4},
        "compressor": {"preset": "tiny", "widths": [8, 8, 8], "c_latent": 4},
        "sampling_steps": 2,
        "sampled_batches": 1,
    },
    "stage_c": {
        "prior": {"preset": "tiny", "c_in": 4, "c": 16, "c_cond": 16, "nhead": 2},
        "sampling_steps": 2,
        "stage_b_steps": 2,
    },
    "single_stage": {
        "unet": UNET | {"c_hidden": [16], "nhead": [2], "blocks": [1], "level_config": ["CTA"]},
        "sampling_steps": 2,
    },
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes of shapes with networks of a few channels and a handful of steps."""
    folder = tmp_path_factory.mktemp("recipes")
    for stage, model in MODELS.items():
        config = yaml.safe_load((SHAPES / f"{stage}.yaml").read_text(encoding="utf8"))
        settings = config["model"]["init_args"]
        settings |= model
        if "text_encoder" in settings and isinstance(settings["text_encoder"], dict):
            settings["text_encoder"] |= TEXT
        config["data"]["init_args"] |= {"micro_batch_size": 4, "global_batch_size": 4}
        config["trainer"] |= {"max_steps": STEPS[stage], "limit_val_batches": 1, "log_every_n_steps": 1}
        kept = ("LRRewarming", "WeightAverage", "ModelCheckpoint", "ExactResume", "SaveOnSignal")
        config["trainer"]["callbacks"] = [c for c in config["trainer"]["callbacks"] if c["class_path"] in kept]
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One other compression of Stage B."""
    monkeypatch.setattr("rewurst.reproduce.wuerstchen.recipes.COMPRESSIONS", ((2, 16),))
    monkeypatch.setattr("rewurst.reproduce.wuerstchen.recipes.POINTS", (2,))
    return iter(())


def test_from_drawn_shapes_to_the_report(recipes: Path, few: None, tmp_path: Path) -> None:
    options = Options(tmp_path, recipes=recipes, prompts=2, short_steps=2, pictures=1, at_once=os.cpu_count() or 1)
    results = reproduce(options)
    kinds = {
        "stage_a",
        "stage_b",
        "latents",
        "stage_c",
        "single_stage",
        "judge_stage_c",
        "judge_single_stage",
        "timing",
    }
    shorts = {"stage_b_4x8x8", "stage_b_2x4x4"}
    assert {kind for kind, _ in results} == kinds | shorts | {f"judge_{kind}" for kind in (*shorts, "stage_b")}

    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["claims"][0]) >= {"claim", "paper", "ours", "spread", "verdict"}
    assert {claim["verdict"] for claim in report["claims"]} == {"undecided"}, "one seed decides nothing"
    flops = report["training_flops"]
    single = next(row for row in report["costs"] if row["stage"] == "single_stage")
    assert flops["single_stage"] == pytest.approx(flops["stage_b"] + flops["stage_c"], abs=5 * single["flops_a_step"])
    assert [row["steps"] for row in report["table"] if row["model"] == "stage_c"] == [4, 8]
    assert {tuple(row["z"]): row["ratio"] for row in report["compressions"]} == {(4, 8, 8): 48, (2, 4, 4): 384}
    assert all(row["psnr"] > 0 for row in report["compressions"])
    assert min(report["seconds_a_picture"].values()) > 0
    text = (tmp_path / "report.md").read_text()
    assert "at most 2.76e+22 FLOPs" in text
    assert (tmp_path / "flops.png").exists()
    assert (tmp_path / "compression.png").exists()

    def refuse(*_: Any) -> None:
        raise AssertionError("there is nothing to run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewurst.reproduce.runner.launch", refuse)
        assert reproduce(options) == results
