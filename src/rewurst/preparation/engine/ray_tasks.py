"""Work units on the machines of a Ray cluster.

Tasks of Ray and not Ray Data: a unit of preparation has a place in an order, a name that follows from it and a file
that says it is done, while Ray Data names files by its own blocks, may cut and merge these as it likes and writes what
was written before again when a job is started anew. Tasks bring what is needed of it: they are scheduled over the
cluster, and tried again elsewhere when a process or a machine is lost.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from ... import UsageError

RETRIES = 4
"""Times that a unit is tried again whose process or machine was lost."""
KNOCK_SECONDS = 20.0

U = TypeVar("U")
R = TypeVar("R")


class Ray:
    """A Ray cluster: the one at ``address``, in ``RAY_ADDRESS`` or that this process uses; else one of this machine.

    Args:
        address: Such as ``auto`` or ``ray://head:10001``.
        most: Units at work at once; by default as many as the cluster has room for.
        cpus: Cores that a unit takes.
        gpus: GPUs that a unit takes.

    Raises:
        UsageError: Ray is not installed, there is no cluster at the address.
    """

    def __init__(self, address: str | None = None, most: int | None = None, cpus: int = 1, gpus: int = 0) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("engine ray needs a package: pip install 'rewurst[ray]'") from None
        if most is not None and most < 1:
            raise UsageError(f"workers is {most}, expected 1 or more with engine ray")
        self._ray: Any = ray
        self._address, self._most, self._cpus, self._gpus = address, most, cpus, gpus
        self._started = False

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
            address = self._address or os.environ.get("RAY_ADDRESS", "")
            try:
                _knock(address)
                self._ray.init(self._address, log_to_driver=False, logging_level="warning")
            except Exception as error:  # Ray raises nothing narrower when its own processes do not start in time
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                what = f"ray_address {address}: no Ray cluster there" if address else "no Ray cluster starts here"
                raise UsageError(f"{what} ({reason})") from None
            self._started = True
        self._check_resources()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            self._ray.shutdown()

    def run(self, function: Callable[[Any, U], R], job: Any, units: Iterable[tuple[str, U]]) -> Iterator[tuple[str, R]]:
        """Yield the name and ``function(job, unit)`` of every unit, in the order in which they are done.

        A unit whose process was lost is done again, up to ``RETRIES`` times, perhaps while the lost one still works.

        Args:
            function: Function that can be imported by its name on every machine.
            job: What all units share.
            units: Names and units, read only as far as there is room for them.

        Raises:
            UsageError: A unit raised it, or its process was lost each time.
        """
        task = self._ray.remote(function).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=RETRIES, name=function.__name__
        )
        shared, pending = self._ray.put(job), dict[Any, str]()
        try:
            for name, unit in units:
                pending[task.remote(shared, unit)] = name
                while len(pending) >= self._room():
                    yield self._next(pending)
            while pending:
                yield self._next(pending)
        finally:
            for reference in pending:
                self._ray.cancel(reference, force=True)

    def _next(self, pending: dict[Any, str]) -> tuple[str, Any]:
        [reference], _ = self._ray.wait(list(pending), num_returns=1)
        name = pending.pop(reference)
        try:
            return name, self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the function raised
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"{name}: its process was lost {RETRIES + 1} times, perhaps for want of memory ({reason}); "
                "give more of it, or --workers for fewer at once, and start again: what is done stays"
            ) from None

    def _room(self) -> int:
        if self._most is not None:
            return self._most
        total = self._ray.cluster_resources()  # it may grow and shrink
        return 2 * int(max(total.get("CPU", 1) // self._cpus, 1))  # one in work, one that waits

    def _check_resources(self) -> None:
        total = self._ray.cluster_resources()
        if self._gpus and total.get("GPU", 0) < self._gpus:
            raise UsageError("device cuda: the Ray cluster has no GPU; start its machines with one, or --device cpu")


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT, which Ray itself takes minutes to find."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
