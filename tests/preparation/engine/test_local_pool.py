"""Units on local worker processes: bounded in number, and one line when a process dies."""

from __future__ import annotations

import operator
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from rewurst import UsageError
from rewurst.preparation.engine import local_pool
from rewurst.preparation.engine.local_pool import LocalPool


def _units(count: int) -> Iterator[tuple[str, int]]:
    return ((f"unit {i}", i) for i in range(count))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_unit_is_done_once(workers: int) -> None:
    with LocalPool(workers) as pool:
        assert sorted(pool.run(max, 3, _units(7))) == [(f"unit {i}", max(3, i)) for i in range(7)]


@pytest.mark.parametrize("workers", [1, 2])
def test_exceptions_of_a_unit_are_raised(workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(LocalPool(workers).run(divmod, 7, _units(3)))


def test_a_worker_that_dies_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"a worker process died, .* try --workers below 2 .*what is done stays"):
        list(LocalPool(2).run(operator.call, os._exit, [("unit", 1)]))


def test_few_units_are_in_flight_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """This bounds the memory for units that have been read and results that are not written yet."""
    read = 0

    def units() -> Iterator[tuple[str, int]]:
        nonlocal read
        for name, unit in _units(200):
            read += 1
            yield name, unit

    class Pool:
        """Do units at once in this process."""

        def __init__(self, workers: int, context: Any, initializer: Any, arguments: tuple[Any, Any]) -> None:
            initializer(*arguments)

        def submit(self, function: Any, unit: int) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(function(unit))
            return future

        def shutdown(self, cancel_futures: bool) -> None:
            assert cancel_futures

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(local_pool, "ProcessPoolExecutor", Pool)
    for done, _ in enumerate(LocalPool(3).run(max, 0, units())):
        assert read - done <= 3 * local_pool.UNITS_PER_WORKER
    signal.signal(signal.SIGINT, handler)
    assert done == 199
