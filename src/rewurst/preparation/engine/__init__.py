"""Run the units of a preparation in processes of this machine or on a Ray cluster, and keep those that are done."""

from __future__ import annotations

from ... import UsageError
from .local_pool import LocalPool
from .ray_tasks import Ray

ENGINES = ("local", "ray")


def open_engine(
    engine: str, workers: int | None, ray_address: str | None, cpus: int = 1, gpus: int = 0
) -> LocalPool | Ray:
    """Return the engine that runs units; use it as a context manager.

    Args:
        engine: ``local`` for processes of this machine, ``ray`` for the machines of a Ray cluster.
        workers: Units at work at once (default: one in this process; with ``ray`` as many as there is room for).
        ray_address: Address of the cluster, see :class:`Ray`.
        cpus: Cores that a unit takes on a cluster.
        gpus: GPUs that a unit takes on a cluster.

    Raises:
        UsageError: There is no such engine, the number of workers is out of range, or an address is given for the
            local engine.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine is {engine!r}, expected {' or '.join(ENGINES)}")
    if engine == "ray":
        return Ray(ray_address, workers, cpus, gpus)
    if ray_address is not None:
        raise UsageError(f"ray_address is {ray_address!r}, which --engine ray is for; engine is {engine!r}")
    if workers is not None and workers < 0:
        raise UsageError(f"workers is {workers}, expected 0 or more")
    return LocalPool(workers or 1)
