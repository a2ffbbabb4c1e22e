"""Fixtures of synthetic evidence: every run of the grid with curves made of a few numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rewurst.reproduce.continual.corpora import Data
from rewurst.reproduce.continual.jobs import RunJob, make_jobs
from rewurst.reproduce.continual.results import LossResult
from rewurst.reproduce.continual.runs import Run, grid
from rewurst.reproduce.continual.scales import SCALES, Scale

Results = dict[tuple[str, int], LossResult]
Losses = dict[str, tuple[float, float]]  # a run's old and new loss at its end

# Results of the trial at small size or, if it has none, of the papers.
ENDS: Losses = {
    "old": (3.84, 5.11), "replay_0": (5.39, 3.23), "constant": (4.76, 3.59), "new_from_scratch": (6.30, 3.47),
    "both_from_scratch": (3.68, 3.30), "replay_0.5": (4.9, 3.23), "replay_1": (4.6, 3.23), "replay_5": (4.32, 3.234),
    "replay_10": (4.11, 3.243), "replay_25": (3.85, 3.28), "replay_50": (3.75, 3.4), "warmup_0": (5.38, 3.24),
    "warmup_0.5": (5.4, 3.23), "warmup_2": (5.39, 3.22), "peak_0.5": (5.2, 3.3), "peak_2": (5.6, 3.2),
    "again_peak_1": (3.6, 5.0), "again_peak_2": (3.65, 5.0),
}  # fmt: skip
SPLITS = {1: 3.9, 2: 3.5, 3: 3.3}


@pytest.fixture
def data(write_corpus: Callable[..., str]) -> Data:
    """Write two corpora and three splits of random rows."""
    corpora = {name: write_corpus(name, 40, seed) for seed, name in enumerate(("old", "new", "s1", "s2", "s3"))}
    splits = tuple({f"split_{n}": {"path": corpora[f"s{n}"]}} for n in (1, 2, 3))
    one = {name: {"path": corpora[name]} for name in ("old", "new")}
    return Data({"old": one["old"]}, {"new": one["new"]}, {name: corpora[name] for name in one}, splits)


@pytest.fixture
def scale() -> Scale:
    """Return the tiny scale with few steps."""
    return replace(SCALES["tiny"], steps=20, split_steps=20, every=10)


@pytest.fixture
def jobs(scale: Scale, data: Data, tmp_path: Path) -> list[RunJob]:
    """Return the jobs of every run with three seeds."""
    runs = grid(scale.steps, scale.split_steps, scale.peak)
    return make_jobs(runs, [0, 1, 2], scale, data, tmp_path / "out")


@pytest.fixture
def results(jobs: list[RunJob]) -> Results:
    """Return results like the trial's, slightly different for each seed."""
    return {(job.run.name, job.seed): synthetic(job) for job in jobs}


def synthetic(job: RunJob, noise: float = 0.004) -> LossResult:
    begin, middle, end = job.start, job.start + job.run.steps // 2, job.steps
    old, new = ends(job.run)
    shift = noise * (job.seed - 1)
    first = ENDS["old"] if job.parent else (7.6, 7.6)
    rise = 0.1 * float(job.run.name.removeprefix("again_peak_")) if job.run.content == "again" else 0.0
    losses = {
        "old": [(begin, first[0]), (middle, first[0] + rise + shift), (end, old + shift)],
        "new": [(begin, first[1]), (middle, (first[1] + new) / 2), (end, new - shift)],
    }
    if job.run.content.startswith("split"):
        del losses["old"]
    losses = {name: curve if job.parent else curve[1:] for name, curve in losses.items()}
    return LossResult(
        key=job.key, losses=losses, tokens=job.steps * 2048, steps=job.steps, share_read=job.run.share, seconds=1.0
    )


def ends(run: Run) -> tuple[float, float]:
    return ENDS.get(run.name) or (0.0, SPLITS[int(run.name[-1])])
