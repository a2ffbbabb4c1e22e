"""Run units of work in processes of this machine."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from ... import UsageError

UNITS_PER_WORKER = 2  # one in work and one that waits, so that a worker never does

U = TypeVar("U")
R = TypeVar("R")


class LocalPool:
    """Worker processes of this machine.

    Args:
        workers: Number of processes; with 0 or 1 the work is done in this process.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: the processes end with each :meth:`run`."""

    def run(self, function: Callable[[Any, U], R], job: Any, units: Iterable[tuple[str, U]]) -> Iterator[tuple[str, R]]:
        """Yield the name and ``function(job, unit)`` of every unit, in the order in which they are done.

        Args:
            function: Function that can be imported by its name.
            job: What all units share.
            units: Names and units, read at most ``UNITS_PER_WORKER`` per worker ahead of what has been yielded.

        Raises:
            UsageError: A unit raised it, or a process died.
        """
        if self.workers <= 1:
            for name, unit in units:
                yield name, function(job, unit)
            return
        # Spawned, not forked: this process may have threads of torch and tokenizers, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        started = context.Event()
        pool = ProcessPoolExecutor(self.workers, context, _start_worker, (function, job, started))
        pending: dict[Future[Any], str] = {}
        try:
            for name, unit in units:
                pending[pool.submit(_work_on, unit)] = name
                if len(pending) >= self.workers * UNITS_PER_WORKER:
                    yield from _done(pending)
            while pending:
                yield from _done(pending)
        except BrokenProcessPool:
            raise self._died(started.is_set()) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _died(self, started: bool) -> UsageError:
        if started:
            return UsageError(
                f"a worker process died, perhaps for want of memory; try --workers below {self.workers} and start "
                "again: what is done stays"
            )
        script = getattr(sys.modules["__main__"], "__file__", None)
        return UsageError(
            f"the worker processes could not start: each of them imports {script or 'the main script'} again, so what "
            'that does must stand below `if __name__ == "__main__":`; or set workers to 1'
        )


def _done(pending: dict[Future[Any], str]) -> Iterator[tuple[str, Any]]:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        yield pending.pop(future), future.result()


_function: Callable[[Any, Any], Any] | None = None  # of this worker process
_job: Any = None


def _start_worker(function: Callable[[Any, Any], Any], job: Any, started: Event) -> None:
    global _function, _job
    Thread(target=_end_with_parent, daemon=True).start()
    started.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    _function, _job = function, job


def _end_with_parent() -> None:
    """End this process when its parent is killed: it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work_on(unit: Any) -> Any:
    assert _function is not None
    return _function(_job, unit)
