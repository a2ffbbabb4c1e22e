"""Run jobs as processes, several at a time, and resume where a run was stopped.

A job with a result is not run again. A stopped job resumes from its newest checkpoint through ``rewurst fit``. A lock,
which the job's process inherits, keeps two processes from writing the same run, even if a killed runner left its
processes behind or two runners share a folder.
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
from typing import IO, Any, Generic

from tqdm import tqdm

from .. import UsageError
from .jobs import J, Job, Ledger, Name, R

_POLL_SECONDS = 0.5
_SAVING_SECONDS = 120.0
_LOG_LINES = 15


class Stopped(Exception):  # noqa: N818  # not an error
    """Raised when the runner was asked to stop and its processes have saved."""


@dataclass
class Attempt(Generic[J]):
    """A running job, started by this runner or, if ``process`` is None, by another one that holds its lock."""

    job: J
    process: subprocess.Popen[bytes] | None = None
    began: float = field(default_factory=time.monotonic)


@dataclass
class Runner(Generic[J, R]):
    """Runner that finishes jobs.

    Args:
        jobs: Jobs in the order in which to start them, each after those that it needs.
        ledger: Ledger of their results.
        at_once: Number of processes at a time.
        finished: Function called with all results after each finished job.
    """

    jobs: Sequence[J]
    ledger: Ledger[J, R]
    at_once: int
    finished: Callable[[dict[Name, R]], None] = lambda results: None
    results: dict[Name, R] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def run(self) -> dict[Name, R]:
        """Run all jobs without a result.

        Raises:
            Stopped: The runner got SIGTERM, SIGINT or Ctrl-C.
        """
        self.results |= results_of(self.jobs, self.ledger)
        waiting = [job for job in self.jobs if job.name not in self.results]
        going: list[Attempt[J]] = []
        steps = sum(job.own_steps for job in self.jobs)
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

    def _start(self, waiting: list[J], going: list[Attempt[J]]) -> list[J]:
        """Start the jobs that can run; return those that still wait."""
        left = []
        for job in waiting:
            failed = [other.label for other in job.needs if other.label in self.failures]
            if failed:
                self.failures[job.label] = f"needs {failed[0]}, which failed"
            elif len(going) >= self.at_once or any(other.name not in self.results for other in job.needs):
                left.append(job)
            else:
                going.append(Attempt(job, launch(job, self.at_once)))
        return left

    def _settle(self, attempt: Attempt[J], bar: Any) -> bool:
        """Return whether an attempt is over, and record its result or failure."""
        job = attempt.job
        if attempt.process is None and self.ledger.load(job) is None:
            attempt.process = launch(job, self.at_once)  # None while another runner still runs it
            return False
        status = attempt.process.poll() if attempt.process else 0
        if status is None:
            return False
        result = self.ledger.load(job) or self.ledger.keep(job, self.results, time.monotonic() - attempt.began)
        if result is None:
            what = f"exit status {status}" if status else "stopped before the end"
            self.failures[job.label] = f"{what}; {job.folder / 'log.txt'} ends with: {_tail(job.folder / 'log.txt')}"
            bar.write(f"{job.label} failed: {what}", file=sys.stderr)
        else:
            self.results[job.name] = result
            bar.write(f"{job.label}: {result.summary()}", file=sys.stderr)
            self.finished(self.results)
        return True

    def _show(self, bar: Any, going: list[Attempt[J]]) -> None:
        done = sum(job.own_steps for job in self.jobs if job.name in self.results)
        now = done + sum(attempt.job.steps_done() for attempt in going)
        under_way = ", ".join(attempt.job.label for attempt in going)
        if (now, under_way) == (bar.n, bar.postfix) and not sys.stderr.isatty():
            return  # write a line to a log only if something changed
        bar.n = now
        bar.set_description(f"{len(self.results)} of {len(self.jobs)} runs", refresh=False)
        bar.set_postfix_str(under_way, refresh=False)
        bar.refresh()


def bring_to_end(
    runner: Runner[J, R], report: Callable[[dict[Name, R]], None], report_only: bool, what: str = "runs"
) -> dict[Name, R]:
    """Run all jobs without a result and write the report, even when stopped.

    Args:
        runner: Jobs and their ledger.
        report: Function that writes the report of the results so far.
        report_only: Whether to run nothing.
        what: Name of the jobs in messages.

    Raises:
        UsageError: The runner was stopped, or jobs failed; the report is written without them.
    """
    if report_only:
        results = results_of(runner.jobs, runner.ledger)
        report(results)
        return results
    try:
        runner.run()
    except Stopped:
        report(runner.results)
        done = f"{len(runner.results)} of {len(runner.jobs)} {what} are done"
        raise UsageError(f"stopped: {done}; run the same command again to resume") from None
    report(runner.results)
    if runner.failures:
        first, why = next(iter(runner.failures.items()))
        raise UsageError(f"{len(runner.failures)} of {len(runner.jobs)} {what} failed. {first}: {why}")
    return runner.results


def results_of(jobs: Sequence[J], ledger: Ledger[J, R]) -> dict[Name, R]:
    """Return the results of finished jobs."""
    found = {job.name: ledger.load(job) for job in jobs}
    return {name: result for name, result in found.items() if result is not None}


def launch(job: Job, at_once: int) -> subprocess.Popen[bytes] | None:
    """Start a job's process; return None if another process holds its lock."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "lock").open("a") as lock, (job.folder / "log.txt").open("ab") as log:
        if not _take(lock):
            return None
        threads = str(max(1, (os.cpu_count() or 1) // at_once))
        command = [sys.executable, *job.command()]
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        # A separate session: Ctrl-C reaches only the runner, which asks the processes to save.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, pass_fds=[lock.fileno()], start_new_session=True, env=environment
        )
        lock.truncate(0)
        lock.write(f"{process.pid}\n")  # tells users which process holds the lock
        return process


def _take(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stop(going: Sequence[Attempt[Any]]) -> None:
    """Ask processes to save and end, and wait for them."""
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


def _tail(path: Path) -> str:
    lines = re.split(r"[\r\n]+", path.read_text(encoding="utf8", errors="replace").strip())
    return " | ".join(lines[-_LOG_LINES:])
