"""The example of the continued prior: configs, validations and the report's arithmetic."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(ROOT)
    import continued_prior

    return continued_prior


def arguments_of(config: dict[str, Any], name: str) -> Any:
    return next(c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"] == name)


def test_runs_differ_from_the_recipe_as_named(example: ModuleType) -> None:
    recipe = yaml.safe_load((ROOT / "configs/wuerstchen/continue_c.yaml").read_text())
    begun = yaml.safe_load((ROOT / "configs/wuerstchen/shapes/stage_c.yaml").read_text())["trainer"]["max_steps"]
    for run in example.RUNS:
        config = example.config_of(run, 300)
        assert (config["model"], config["data"]) == (recipe["model"], recipe["data"])
        assert config["ckpt_path"] == recipe["ckpt_path"]
        assert config["trainer"]["max_steps"] == begun + 300
        assert config["trainer"]["max_steps"] % config["trainer"]["val_check_interval"] == 0
        assert arguments_of(config, "ReplayScheduler")["share"] == run.share
        rewarming = arguments_of(config, "LRRewarming")
        whole = arguments_of(recipe, "LRRewarming")["schedule"]
        assert rewarming["length"] == 300
        low = {"class_path": "Constant", "init_args": {"level": whole["init_args"]["minimum"]}}
        assert rewarming["schedule"] == (whole if run.rewarmed else low)
        assert arguments_of(config, "ModelCheckpoint")["dirpath"] == f"runs/continued_prior/{run.name}/checkpoints"
    assert [run.share for run in example.RUNS] == [0, 0.05, 0.25, 0]


@pytest.mark.parametrize(
    ("begun", "steps", "every"), [(1500, 700, 100), (1800, 700, 100), (1500, 5, 1), (1000, 700, 100)]
)
def test_the_last_validation_is_at_the_end(example: ModuleType, begun: int, steps: int, every: int) -> None:
    assert example.interval(begun, steps) == every
    assert (begun + steps) % every == 0


def test_the_report_contains_the_logged_values(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss on old pictures rises by 0.4 without replay; 5 % takes 0.3 of it away, 25 % more than all."""
    monkeypatch.setattr(example, "OUT", tmp_path)
    ends = {"no_replay": (1.4, 0.5), "replay_5": (1.1, 0.55), "replay_25": (0.9, 0.6), "constant": (1.2, 0.8)}
    begun = yaml.safe_load((ROOT / "configs/wuerstchen/shapes/stage_c.yaml").read_text())["trainer"]["max_steps"]
    for name, (old, new) in ends.items():
        with SummaryWriter(str(tmp_path / name / "version_0")) as writer:
            for step, share in ((100, 0.5), (200, 1.0)):  # the losses go straight to the end
                at = begun + step - 1
                for corpus, start, end in (("seen", 1.0, old), ("new", 2.0, new)):
                    writer.add_scalar(f"val/loss/{corpus}", start + share * (end - start), at)
                writer.add_scalar("forgetting/seen", share * (old - 1.0), at)
                writer.add_scalar("adaptation/new", share * (2.0 - new), at)
            writer.add_scalar("replay/share_read", 0.05, begun + 199)
    results = [example.read(run, argparse.Namespace(steps=200, prompts=0)) for run in example.RUNS]
    assert [step for step, _ in results[0].losses["old"]] == [0, 100, 200]
    assert [loss for _, loss in results[0].losses["new"]] == pytest.approx([2.0, 1.25, 0.5])
    shown = dict.fromkeys(("size", "colour", "shape", "position", "background", "all"), 0.5)
    start = {"old": shown, "new": shown | {"all": 0.25}}
    example.write(example.summarise(results, start) | {"steps": 200}, results, tmp_path)

    found = json.loads((tmp_path / "report.json").read_text())
    assert found["start"]["loss"] == pytest.approx({"old": 1.0, "new": 2.0})
    taken = {name: run["rise_taken_away"] for name, run in found["runs"].items()}
    assert taken == pytest.approx({"no_replay": 0.0, "replay_5": 0.75, "replay_25": 1.25, "constant": 0.5})
    assert found["runs"]["replay_25"]["loss"] == pytest.approx({"old": 0.9, "new": 0.6})
    text = (tmp_path / "report.md").read_text()
    assert "| re-warmed, no replay | 1.4000 | +0.4000 |  | 0.5000 |" in text
    assert "| re-warmed, 5 % replay | 1.1000 | +0.1000 | 75% | 0.5500 |" in text
    assert "| start | 0.50 / 0.50 |" in text
    assert (tmp_path / "losses.png").stat().st_size > 10_000
