"""The demo's report contains the logged values, and the demo shows forgetting and its reduction by replay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import report

    return report


def log(folder: Path, tag_values: dict[str, dict[int, float]]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for tag, values in tag_values.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step)


def losses(prose: dict[int, float], code: dict[int, float]) -> dict[str, dict[int, float]]:
    return {"val/loss/prose": prose, "val/loss/code": code}


def test_the_report_contains_the_logged_values(report: ModuleType, tmp_path: Path) -> None:
    log(tmp_path / "start" / "version_0", {"tokens": {9: 1000.0}, **losses({4: 5.0}, {4: 7.0})})
    log(tmp_path / "start" / "version_1", {"tokens": {19: 2000.0}, **losses({19: 4.0}, {19: 6.0})})
    for name, final in (("no_replay", (5.5, 3.0)), ("replay", (4.25, 3.125))):
        tags: dict[str, Any] = {"tokens": {39: 4000.0}, **losses({39: final[0]}, {39: final[1]})}
        if name == "replay":
            tags["replay/share_read"] = {29: 0.04, 39: 0.05}
        log(tmp_path / name / "version_0", tags)
    runs = [("start", 0.0), ("no_replay", 0.0), ("replay", 0.05)]
    results = [report.read(name, name.title(), tmp_path / name, share) for name, share in runs]
    report.write(results, {name: f"sample of {name}" for name, _ in runs}, "def", tmp_path, 12.34)

    found = json.loads((tmp_path / "report.json").read_text())["continual"]
    assert found["loss"] == {
        "start": {"prose": 4.0, "code": 6.0},
        "no_replay": {"prose": 5.5, "code": 3.0},
        "replay": {"prose": 4.25, "code": 3.125},
    }
    assert found["tokens"] == {"start": 2000, "no_replay": 2000, "replay": 2000}
    assert (found["replay_share_asked"], found["seconds"]) == (0.05, 12.3)
    assert found["replay_share_read"] == pytest.approx(0.05)
    assert results[0].losses["prose"] == [(500.0, 5.0), (2000.0, 4.0)]
    text = (tmp_path / "report.md").read_text()
    assert "| No_Replay | 5.500 | 3.000 | 4.250 | +1.500 |  |" in text
    assert "| Replay | 4.250 | 3.125 | 3.688 | +0.250 | 5.00% |" in text
    assert "sample of replay" in text
    assert (tmp_path / "losses.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_demo_shows_forgetting_and_its_reduction_by_replay() -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py")], check=True, cwd=ROOT)
    found = json.loads((ROOT / "runs/demo/report.json").read_text())["continual"]
    start, without, replayed = (found["loss"][run] for run in ("start", "no_replay", "replay"))
    rise = without["prose"] - start["prose"]
    assert rise >= 0.5
    assert replayed["prose"] - start["prose"] <= rise / 2
    assert abs(replayed["code"] - without["code"]) <= 0.03
    rows = found["tokens"]["replay"] / 128
    assert abs(found["replay_share_read"] - found["replay_share_asked"]) * rows <= 1
