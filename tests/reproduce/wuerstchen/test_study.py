"""The comparison of cascade and single stage from end to end, with few steps of small networks, and wrong use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor, nn

from rewurst.preparation.images import prepare_images
from rewurst.reproduce.jobs import Job
from rewurst.reproduce.wuerstchen import work
from rewurst.reproduce.wuerstchen.study import Options, reproduce
from rewurst.train import main

SHAPES = Path(__file__).parents[3] / "configs" / "wuerstchen" / "shapes"
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


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader is not resumable.*",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:.*in eval mode at the start",
)


class Ended:
    """A process that has ended well."""

    def poll(self) -> int:
        return 0


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the jobs in this process, which saves the imports of a dozen others, and return their kinds."""
    kinds: list[str] = []

    def begin(job: Job, at_once: int) -> Ended:
        job.folder.mkdir(parents=True, exist_ok=True)
        _, module, *arguments = job.command()
        if module == "rewurst.train":
            assert main(arguments) == 0
        else:
            assert module == work.__name__
            work.main(Path(arguments[0]))
        kinds.append(job.kind)
        return Ended()

    monkeypatch.setattr("rewurst.reproduce.runner.launch", begin)
    monkeypatch.setattr("rewurst.reproduce.runner._POLL_SECONDS", 0.0)
    return kinds


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the recipes of shapes with networks of a few channels and a handful of steps."""
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


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the comparison to one other compression of Stage B and two points per run."""
    monkeypatch.setattr("rewurst.reproduce.wuerstchen.recipes.COMPRESSIONS", ((2, 16),))
    monkeypatch.setattr("rewurst.reproduce.wuerstchen.recipes.POINTS", (2,))


def test_from_drawn_shapes_to_the_report(recipes: Path, began: list[str], tmp_path: Path) -> None:
    options = Options(tmp_path, recipes=recipes, prompts=2, short_steps=2, pictures=1)
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
    assert flops["single_stage"] == pytest.approx(flops["stage_b"] + flops["stage_c"], abs=5 * single["flops_per_step"])
    assert [row["steps"] for row in report["table"] if row["model"] == "stage_c"] == [4, 8]
    assert {tuple(row["z"]): row["numbers"] for row in report["compressions"]} == {(4, 8, 8): 48, (2, 4, 4): 384}
    assert {row["per_side"] for row in report["compressions"]} == {8, 16}
    assert all(row["psnr"] > 0 for row in report["compressions"])
    assert min(report["seconds_per_picture"].values()) > 0
    text = (tmp_path / "report.md").read_text()
    assert "at most 2.76e+22 FLOPs" in text
    assert (tmp_path / "flops.png").exists()
    assert (tmp_path / "compression.png").exists()

    count = len(began)
    assert reproduce(options) == results
    assert len(began) == count, "nothing is run twice"
    (next(tmp_path.glob("runs/judge_single_stage-*")) / "result.json").unlink()
    assert reproduce(replace(options, report_only=True)).keys() == results.keys() - {("judge_single_stage", 0)}
    assert len(began) == count
    assert "runs are missing" in (tmp_path / "report.md").read_text()


def test_given_pictures_without_weights_to_judge_them(recipes: Path, began: list[str], tmp_path: Path) -> None:
    prepare_images("builtin:shapes", tmp_path / "given", pictures=1, progress=False)
    data, val = str(tmp_path / "given" / "train"), str(tmp_path / "given" / "unseen")
    options = Options(tmp_path / "out", data=data, val=val, image_size=32, recipes=recipes, prompts=2, short_steps=2)
    results = reproduce(options)
    assert not [kind for kind, _ in results if kind.startswith("judge_s") and "stage_b" not in kind]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["image_size"] == 32
    assert report["score"] is None
    assert {tuple(row["z"]) for row in report["compressions"]} == {(4, 4, 4), (2, 2, 2)}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "FID needs Inception's weights" in text
    assert "val/loss/val" in text


def test_fid_of_given_pictures(
    recipes: Path, began: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the colors of quarters instead of Inception's features, whose weights are not included."""

    class Quarters(nn.Module):
        def forward(self, pictures: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(pictures.float(), 2).flatten(1)

    monkeypatch.setattr("rewurst.reproduce.wuerstchen.judging.load_inception", lambda path: Quarters())
    prepare_images("builtin:shapes", tmp_path / "given", pictures=1, progress=False)
    (tmp_path / "inception.pth").touch()
    data, val = str(tmp_path / "given" / "train"), str(tmp_path / "given" / "unseen")
    options = Options(tmp_path / "out", data=data, val=val, inception=str(tmp_path / "inception.pth"), recipes=recipes)
    reproduce(replace(options, prompts=2, short_steps=2))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["score"] == "fid"
    assert all(row["fid"] > 0 for row in report["table"])
    assert {row["ratio"] is not None for row in report["equal_score"]} == {True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds is 0, expected 1 or more"),
        (["--prompts", "0"], "--prompts is 0, expected 1 or more"),
        (["--data", "x"], "--data and --val go together"),
        (["--data", "x", "--val", "y"], "x has no index.json: index its shards with `rewurst prepare index`"),
        (["--inception", "none.pth"], "--inception none.pth is not a file"),
        (["--recipes", "nowhere"], "nowhere/stage_a.yaml is missing"),
        (["--scale", "tiny"], "--scale"),
        (["--seed", "1"], "--seed; did you mean '--seeds'?"),
    ],
)
def test_wrong_use_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "wuerstchen", "--out", str(tmp_path), *options]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line
