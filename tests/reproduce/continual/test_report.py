"""The report shows the results as tables, verdicts and figures, also while runs are missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rewurst.reproduce.continual.corpora import Data
from rewurst.reproduce.continual.jobs import RunJob
from rewurst.reproduce.continual.report import write_report
from rewurst.reproduce.continual.results import LossLedger, LossResult
from rewurst.reproduce.continual.scales import Scale

Results = dict[tuple[str, int], LossResult]
FIGURES = {"replay.png", "peaks.png", "warmups.png", "again.png", "splits.png"}


def test_tables_claims_and_figures(
    jobs: list[RunJob], results: Results, scale: Scale, data: Data, tmp_path: Path
) -> None:
    write_report(tmp_path, scale, jobs, data, results)
    found = json.loads((tmp_path / "report.json").read_text())
    rows = {row["run"]: row for row in found["table"]}
    assert rows["replay_5"]["old"] == pytest.approx(4.32)
    assert rows["replay_5"]["old_spread"] == pytest.approx(0.004)
    assert rows["replay_5"]["average"] == pytest.approx((4.32 + 3.234) / 2)
    assert rows["replay_5"]["paper"] == {"slimpajama": [2.23, 2.51, 2.37], "german": [2.57, 1.12, 1.85]}
    assert rows["cosine_split_2"]["old"] is None
    for claim in found["claims"]:
        assert {"claim", "paper", "ours", "spread", "verdict"} <= set(claim)
        assert claim["verdict"] in ("held", "not held")
    assert sum(claim["verdict"] == "held" for claim in found["claims"]) == len(found["claims"]) - 3
    text = (tmp_path / "report.md").read_text()
    assert "| 5 % replay | 4.320 ± 0.004 | 3.234 ± 0.004 | 3.777 ± 0.000 | +0.480 | 5.00% |" in text
    assert "| 2.23 / 2.51 / 2.37 | 2.57 / 1.12 / 1.85 |" in text
    assert text.count("**held**") >= len(found["claims"]) - 3
    assert f"{len(found['claims'])} claims are tested at once" in text
    assert "81 of 81 runs" in text
    assert {path.name for path in tmp_path.glob("*.png")} == FIGURES
    assert all(f"({name})" in text and (tmp_path / name).stat().st_size > 10_000 for name in FIGURES)


def test_a_part_of_the_runs(jobs: list[RunJob], results: Results, scale: Scale, data: Data, tmp_path: Path) -> None:
    some = {name: results[name] for name in (("old", 0), ("replay_0", 0), ("replay_5", 0), ("replay_0", 1))}
    content = write_report(tmp_path, scale, jobs, data, some)
    assert [(row["run"], row["seeds"]) for row in content["table"]] == [("old", 1), ("replay_0", 2), ("replay_5", 1)]
    assert {claim["verdict"] for claim in content["claims"]} == {"undecided"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"replay.png", "warmups.png"}
    assert write_report(tmp_path, scale, jobs, data, {})["table"] == []


def test_without_splits(jobs: list[RunJob], results: Results, scale: Scale, data: Data, tmp_path: Path) -> None:
    kept = [job for job in jobs if "split" not in job.run.name]
    some = {name: result for name, result in results.items() if "split" not in name[0]}
    content = write_report(tmp_path, scale, kept, replace(data, splits=()), some)
    assert not [claim for claim in content["claims"] if "splits" in claim["claim"]]
    assert "## Three splits" not in (tmp_path / "report.md").read_text()


def test_a_result_is_what_was_logged(jobs: list[RunJob], results: Results) -> None:
    from torch.utils.tensorboard import SummaryWriter

    job = next(job for job in jobs if job.run.name == "replay_5")
    assert (job.start, job.steps) == (20, 40)

    def log(version: int, steps: tuple[int, ...], ahead: int) -> None:
        with SummaryWriter(str(job.folder / f"version_{version}")) as writer:
            for step in steps:
                writer.add_scalar("val/loss/old", (step + ahead) / 10, step)
                writer.add_scalar("val/loss/new", (step + ahead) / 20, step)
                writer.add_scalar("tokens", (step + ahead) * job.tokens_per_step, step)
                writer.add_scalar("replay/share_read", 0.05, step)

    log(0, (20, 29, 30), 1)  # what it began with, and a validation as it was stopped
    before, ledger = results["old", 0], LossLedger()
    assert ledger.keep(job, results, 1.0) is None, "it has not come to its end"
    assert ledger.load(job) is None
    log(1, (29, 30, 40), 0)  # after a resume Lightning logs one step later
    kept = ledger.keep(job, results, 2.0)
    assert kept is not None
    first = before.losses["old"][-1]
    assert kept.losses["old"] == [first, (30, pytest.approx(3.0)), (40, pytest.approx(4.0))]
    assert (kept.tokens, kept.steps) == (40 * 2048, 40)
    assert ledger.load(job) == kept
    assert ledger.load(replace(job, key="another")) is None
