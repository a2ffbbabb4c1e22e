"""Stopped and killed runs resume to the same end; nothing runs twice; failures do not stop other runs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fork_server
import pytest
import yaml

from rewurst.reproduce.continual.corpora import Data
from rewurst.reproduce.continual.jobs import RunJob, make_jobs
from rewurst.reproduce.continual.results import LossLedger, LossResult, Results
from rewurst.reproduce.continual.runs import grid
from rewurst.reproduce.continual.scales import SCALES, Scale
from rewurst.reproduce.runner import Runner, Stopped, launch

STEPS = 120


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork runs from a process that has imported everything."""
    monkeypatch.setattr("rewurst.reproduce.runner.subprocess", fork_server)


@pytest.fixture
def micro(tiny_config: dict[str, Any], tmp_path: Path) -> Scale:
    """Return a scale whose runs take seconds."""
    config = yaml.safe_load((Path(__file__).parents[3] / "configs/continual/demo.yaml").read_text())
    config["model"]["init_args"]["model"] = tiny_config
    config["data"]["init_args"] |= {"sequence_length": 8, "micro_batch_size": 4, "global_batch_size": 8}
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(config))
    return replace(SCALES["tiny"], configs=(str(tmp_path / "micro.yaml"),), steps=STEPS, every=10)


@pytest.fixture
def two(micro: Scale, data: Data, tmp_path: Path) -> Callable[[str], list[RunJob]]:
    """Return jobs of pre-training and of 5 % replay that continues it."""

    def make(folder: str) -> list[RunJob]:
        runs = [run for run in grid(STEPS, STEPS, 1e-2) if run.name in ("old", "replay_5")]
        return make_jobs(runs, [0], micro, data, tmp_path / folder)

    return make


@contextmanager
def when_saved(job: RunJob, then: Callable[[], None]) -> Iterator[None]:
    """Call a function as soon as a job has saved."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            if any(job.folder.rglob("*.ckpt")):
                then()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("_forked")
def test_stopped_and_killed_runs_come_to_the_same_end(two: Callable[[str], list[RunJob]]) -> None:
    whole = Runner(two("whole"), LossLedger(), at_once=2).run()
    assert {name: result.steps for (name, _), result in whole.items()} == {"old": STEPS, "replay_5": 2 * STEPS}
    assert whole["replay_5", 0].share_read == pytest.approx(0.05, abs=1 / (STEPS * 8))
    assert [step for step, _ in whole["replay_5", 0].losses["new"]] == list(range(STEPS, 2 * STEPS + 1, 10))

    old, replayed = two("broken")
    with pytest.raises(Stopped), when_saved(old, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        Runner([old, replayed], LossLedger(), at_once=1).run()
    saved = {path.name for path in old.folder.rglob("*.ckpt")}
    assert saved, "what it was asked to stop had saved"

    with when_saved(replayed, lambda: os.kill(int((replayed.folder / "lock").read_text()), signal.SIGKILL)):
        runner = Runner([old, replayed], LossLedger(), at_once=1)
        runner.run()
    assert set(runner.results) == {("old", 0)}
    assert "exit status -9" in runner.failures["replay_5 seed 0"]

    results = Runner([old, replayed], LossLedger(), at_once=1).run()
    assert {name: result.losses for name, result in results.items()} == {
        name: result.losses for name, result in whole.items()
    }
    assert [len(list(job.folder.rglob("*.ckpt"))) for job in (old, replayed)] == [1, 1]

    def refuse(*_: Any) -> None:
        raise AssertionError("there is nothing to run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewurst.reproduce.runner.launch", refuse)
        assert Runner(two("broken"), LossLedger(), at_once=1).run() == results


def test_a_run_that_another_left_behind_is_waited_for(two: Callable[[str], list[RunJob]]) -> None:
    old, _ = two("orphan")
    process = launch(old, 1)
    assert process is not None
    assert launch(old, 1) is None, "its lock is held"
    with when_saved(old, lambda: None):
        results = Runner([old], LossLedger(), at_once=1).run()
    assert process.wait() == 0
    assert list(results) == [("old", 0)]
    assert len(list(old.folder.glob("version_*"))) == 1, "it was not run a second time"


class Finished:
    """A process that has ended."""

    def __init__(self, status: int) -> None:
        self.status = status

    def poll(self) -> int:
        return self.status


def test_order_and_failures(jobs: list[RunJob], results: dict[tuple[str, int], LossResult]) -> None:
    """Without processes: each run after the one it continues, a bounded number at a time, with separate failures."""
    began: list[tuple[str, int]] = []

    def begin(job: RunJob, at_once: int) -> Finished:
        assert job.parent is None or job.parent.name in began
        began.append((job.run.name, job.seed))
        job.folder.mkdir(parents=True)
        (job.folder / "log.txt").write_text("no luck today")
        return Finished(1 if (job.run.name, job.seed) == ("old", 1) else 0)

    def keep(ledger: LossLedger, job: RunJob, done: Results, seconds: float) -> LossResult | None:
        assert job.parent is None or job.parent.name in done
        return None if (job.run.name, job.seed) == ("old", 1) else results[job.run.name, job.seed]

    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewurst.reproduce.runner.launch", begin)
        patch.setattr(LossLedger, "keep", keep)
        patch.setattr("rewurst.reproduce.runner._POLL_SECONDS", 0.0)
        runner = Runner(jobs, LossLedger(), at_once=2, finished=lambda done: counts.append(len(done)))
        done = runner.run()
    continued = {job.run.name for job in jobs if job.run.parent == "old"}
    missing = {("old", 1)} | {(name, 1) for name in continued}
    assert set(done) == set(results) - missing
    assert set(runner.failures) == {f"{name} seed {seed}" for name, seed in missing}
    assert "no luck today" in runner.failures["old seed 1"]
    assert "which failed" in runner.failures["replay_5 seed 1"]
    assert counts == list(range(1, len(done) + 1))
    assert {seed for _, seed in began[:20]} == {0}, "one seed after the other"
