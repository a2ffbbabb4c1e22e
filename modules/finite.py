"""Noticing values that are not finite without waiting for the device at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 1000  # steps that are kept before they are looked at, where nothing else asks for it


class FiniteWatch:
    """Losses and norms of the steps since they were last looked at, left on the device.

    Asking a tensor whether it is finite makes the host wait until the device has come to it, and the device then waits
    for the host's next kernels. So values are kept as they are, and read together in one copy.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, int, Tensor, Sequence[Any]]] = []

    def add(self, what: str, step: int, values: Tensor, batches: Sequence[Any] = ()) -> None:
        """Keeps values of a step.

        Args:
            what: What they are, for the message.
            step: The optimizer step that they belong to.
            values: Any shape; detached.
            batches: Of each value, what its place in the data can be told from.
        """
        self._kept.append((what, step, values.detach().flatten(), batches))

    @property
    def empty(self) -> bool:
        """Whether nothing is kept."""
        return not self._kept

    @property
    def full(self) -> bool:
        """Whether so many are kept that it is time to look."""
        return len(self._kept) >= MOST

    def forget(self) -> None:
        """Drops what is kept."""
        self._kept = []

    def check(self, locate: Callable[[Any], str] | None = None) -> None:
        """Reads all that is kept, and drops it where everything is finite.

        Args:
            locate: From one of the ``batches`` to words that say where its rows lie.

        Raises:
            FloatingPointError: The first value that is not finite, its step, and its rows where they are known. What
                is kept stays, so that a later save is refused too.
        """
        if not self._kept:
            return
        values = iter(torch.cat([values for _, _, values, _ in self._kept]).cpu().tolist())
        for what, step, kept, batches in self._kept:
            for number, value in enumerate(next(values) for _ in range(len(kept))):
                if not math.isfinite(value):
                    known = locate is not None and number < len(batches) and batches[number] is not None
                    where = f" at {locate(batches[number])}" if locate is not None and known else ""
                    raise FloatingPointError(f"{what} is {value} at optimizer step {step}{where}")
        self.forget()
