"""Runs jobs as processes of ``rewurst fit``, as many at a time as asked for, and goes on where it was stopped.

A job with a result is not run again. One that was stopped goes on from its newest checkpoint, which ``rewurst fit``
does by itself. A lock, which the process of a job inherits, keeps two from writing the same run: also where the runner
was killed and left its processes behind, or where two runners share a folder.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..callbacks.checkpoints import newest_checkpoint
from .jobs import Job
from .results import Results, keep_result, load_result

_POLL_SECONDS = 0.5
_SAVING_SECONDS = 120.0
_LOG_LINES = 15
_STEP = re.compile(r"step=(\d+)")


class Stopped(Exception):  # noqa: N818  # no error
    """The runner was asked to stop; its processes have saved."""


@dataclass
class Attempt:
    """A job that is under way: by this runner, or (``process`` none) by another that holds its lock."""

    job: Job
    process: subprocess.Popen[bytes] | None = None
    began: float = field(default_factory=time.monotonic)


@dataclass
class Runner:
    """Brings jobs to their ends.

    Args:
        jobs: In the order in which they begin; each after the one that it continues.
        at_once: Processes at a time.
        finished: Called with all results after every job that came to its end.
    """

    jobs: Sequence[Job]
    at_once: int
    finished: Callable[[Results], None] = lambda results: None
    results: Results = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def run(self) -> Results:
        """Runs what has no result yet.

        Raises:
            Stopped: By SIGTERM, SIGINT or Ctrl-C.
        """
        self.results |= results_of(self.jobs)
        waiting = [job for job in self.jobs if _name(job) not in self.results]
        going: list[Attempt] = []
        steps = sum(job.run.steps for job in self.jobs)
        with _stop_signals(), tqdm(total=steps, unit=" steps", file=sys.stderr, dynamic_ncols=True) as bar:
            try:
                while waiting or going:
                    going = [attempt for attempt in going if not self._settle(attempt, bar)]
                    waiting = self._start(waiting, going)
                    self._show(bar, going)
                    if going:
                        time.sleep(_POLL_SECONDS)
            except (Stopped, KeyboardInterrupt):
                _stop(going)
                raise Stopped from None
            self._show(bar, going)
        return self.results

    def _start(self, waiting: list[Job], going: list[Attempt]) -> list[Job]:
        """Starts what can be started; returns what waits on."""
        left = []
        for job in waiting:
            if job.parent is not None and _label(job.parent) in self.failures:
                self.failures[_label(job)] = f"it continues {_label(job.parent)}, which failed"
            elif len(going) >= self.at_once or (job.parent is not None and _name(job.parent) not in self.results):
                left.append(job)
            else:
                going.append(Attempt(job, launch(job, self.at_once)))
        return left

    def _settle(self, attempt: Attempt, bar: Any) -> bool:
        """Whether an attempt is over; its result, or what went wrong, is taken note of."""
        job = attempt.job
        if attempt.process is None and load_result(job) is None:
            attempt.process = launch(job, self.at_once)  # none while another runner is still at it
            return False
        status = attempt.process.poll() if attempt.process else 0
        if status is None:
            return False
        before = self.results.get(_name(job.parent)) if job.parent else None
        result = load_result(job) or keep_result(job, before, time.monotonic() - attempt.began)
        if result is None:
            what = f"exit status {status}" if status else f"it stopped before step {job.steps}"
            self.failures[_label(job)] = f"{what}; {job.folder / 'log.txt'} ends with: {_tail(job.folder / 'log.txt')}"
            bar.write(f"{_label(job)} failed: {what}", file=sys.stderr)
        else:
            self.results[_name(job)] = result
            _drop_older_checkpoints(job.folder)
            losses = ", ".join(f"{corpus} {result.final(corpus):.3f}" for corpus in result.losses)
            bar.write(f"{_label(job)}: {losses} ({result.seconds:.0f} s)", file=sys.stderr)
            self.finished(self.results)
        return True

    def _show(self, bar: Any, going: list[Attempt]) -> None:
        done = sum(job.run.steps for job in self.jobs if _name(job) in self.results)
        now = done + sum(_steps_done(attempt.job) for attempt in going)
        under_way = ", ".join(_label(attempt.job) for attempt in going)
        if (now, under_way) == (bar.n, bar.postfix) and not sys.stderr.isatty():
            return  # a log has a line for what changed
        bar.n = now
        bar.set_description(f"{len(self.results)} of {len(self.jobs)} runs", refresh=False)
        bar.set_postfix_str(under_way, refresh=False)
        bar.refresh()


def results_of(jobs: Sequence[Job]) -> Results:
    """The results that are there."""
    found = {_name(job): load_result(job) for job in jobs}
    return {name: result for name, result in found.items() if result is not None}


def launch(job: Job, at_once: int) -> subprocess.Popen[bytes] | None:
    """Starts a job's process; none where another holds its lock."""
    config = job.write_config()
    with (job.folder / "lock").open("a") as lock, (job.folder / "log.txt").open("ab") as log:
        if not _take(lock):
            return None
        threads = str(max(1, (os.cpu_count() or 1) // at_once))
        command = [sys.executable, "-m", "rewurst.train", "fit", "--config", str(config)]
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        # A session of its own: Ctrl-C reaches the runner, which asks the processes to save.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, pass_fds=[lock.fileno()], start_new_session=True, env=environment
        )
        lock.truncate(0)
        lock.write(f"{process.pid}\n")  # for whoever wants to know who holds it
        return process


def _take(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stop(going: Sequence[Attempt]) -> None:
    """Asks processes to save and end, and waits for them."""
    processes = [attempt.process for attempt in going if attempt.process is not None]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(_SAVING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def _stop_signals() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _steps_done(job: Job) -> int:
    """Own steps of a job as far as it has saved."""
    steps = [int(match[1]) for path in job.folder.rglob("*.ckpt") if (match := _STEP.search(path.name))]
    return max(0, max(steps, default=job.start) - job.start)


def _drop_older_checkpoints(folder: Path) -> None:
    newest = newest_checkpoint([folder])
    for path in folder.rglob("*.ckpt"):
        if path.is_file() and path != newest:
            path.unlink()


def _tail(path: Path) -> str:
    lines = re.split(r"[\r\n]+", path.read_text(encoding="utf8", errors="replace").strip())
    return " | ".join(lines[-_LOG_LINES:])


def _name(job: Job) -> tuple[str, int]:
    return job.run.name, job.seed


def _label(job: Job) -> str:
    return f"{job.run.name} seed {job.seed}"
