"""Assign a corpus to every slot of a global batch, with exact shares.

The replay share f(step) is an integer over 2^40. With running sums S(t) of f over the steps before t, the batch of
step t holds ``floor(G S(t+1) / 2^40) - floor(G S(t) / 2^40)`` old rows of G: 51 or 52 of 1024 at 5 %, and the drift
always stays below one row. Old rows are spread evenly over the slots, so that contiguous slices of a batch (one per
rank or micro-batch) differ by at most one. Corpora share the old rows, and the new rows, by weight in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ... import UsageError

UNIT = 1 << 40
_CHUNK = 1024


class RunningShare:
    """Running sums of a share in units of 2^-40, from a step whose sum is known.

    Args:
        share: A number in [0, 1], or a function of the step.
        step: First step whose sum may be requested.
        total: Sum over the steps before ``step``.
    """

    def __init__(self, share: float | Callable[[int], float], step: int = 0, total: int = 0) -> None:
        self._share = share
        self._first = step
        self._sums = [total]

    def total(self, step: int) -> int:
        """Return the exact sum over the steps before ``step``.

        Raises:
            UsageError: The share at some step is not in [0, 1].
        """
        if step < self._first:
            raise UsageError(f"step {step} is before step {self._first}, where this run was restored")
        if not callable(self._share):
            return self._sums[0] + (step - self._first) * _units(self._share, step)
        while len(self._sums) <= step - self._first:
            begin = self._first + len(self._sums) - 1
            for later in range(begin, begin + _CHUNK):
                self._sums.append(self._sums[-1] + _units(self._share(later), later))
        return self._sums[step - self._first]


@dataclass
class Mixture:
    """Mixture of new and old corpora in global batches.

    Args:
        global_batch_size: Number of rows per global batch, G.
        new: Weight by name of the corpora to learn.
        old: Weight by name of the corpora to replay.
        share: Share of old rows by step.
    """

    global_batch_size: int
    new: Mapping[str, float]
    old: Mapping[str, float] = field(default_factory=dict)
    share: RunningShare = field(default_factory=lambda: RunningShare(0.0))

    def __post_init__(self) -> None:
        for name, weight in {**self.new, **self.old}.items():
            if not weight > 0:
                raise UsageError(f"corpus {name!r}: weight {weight} must be above 0")
        self.names = [*self.new, *self.old]
        self._ratios_new, self._ratios_old = ratios(self.new), ratios(self.old)

    def read_before(self, step: int) -> NDArray[np.int64]:
        """Return the rows of each corpus (in the order of ``names``) read before ``step``."""
        rows = self.global_batch_size * step
        old = self.global_batch_size * self.share.total(step) // UNIT
        return np.array([*split(rows - old, self._ratios_new), *split(old, self._ratios_old)], dtype=np.int64)

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the corpus (index into ``names``) and counter of every slot of a global batch, each ``(G,)``."""
        if len(self.names) == 1:
            first = self.global_batch_size * step
            whole = np.arange(first, first + self.global_batch_size, dtype=np.int64)
            return np.zeros(self.global_batch_size, dtype=np.int64), whole
        before = self.read_before(step)
        counts = self.read_before(step + 1) - before
        size, new = self.global_batch_size, len(self.new)
        corpus = np.empty(size, dtype=np.int64)
        is_old = _spread(int(counts[new:].sum()), size)
        corpus[~is_old] = _arrange(counts[:new])
        corpus[is_old] = new + _arrange(counts[new:])
        counter = np.empty(size, dtype=np.int64)
        for index in np.flatnonzero(counts).tolist():
            counter[corpus == index] = np.arange(before[index], before[index] + counts[index])
        return corpus, counter


def _units(share: float, step: int) -> int:
    if not 0 <= share <= 1:
        raise UsageError(f"replay share {share} at step {step} must be between 0 and 1")
    return round(float(share) * UNIT)


def ratios(weights: Mapping[str, float]) -> list[int]:
    """Return each corpus's share, in units, of the slots that earlier corpora leave free."""
    values = list(weights.values())
    return [round(value / (sum(values[index:]) or 1) * UNIT) for index, value in enumerate(values)]


def split(rows: int, parts: Sequence[int]) -> list[int]:
    """Return the rows read so far by corpus: counts that never decrease with ``rows`` and add up to it."""
    counts = []
    for ratio in parts:
        counts.append(rows * ratio // UNIT)
        rows -= counts[-1]
    return counts


def _spread(marked: int, size: int) -> NDArray[np.bool_]:
    """Mark ``marked`` of ``size`` slots evenly: slices of equal length differ by at most one."""
    if marked in (0, size):
        return np.full(size, marked > 0)
    steps = np.arange(size + 1, dtype=np.int64) * marked // size
    return np.diff(steps) > 0


def _arrange(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return indices with the given counts, each spread evenly over the slots that earlier ones leave free."""
    result = np.full(int(counts.sum()), len(counts) - 1, dtype=np.int64)
    if len(counts) == 1:
        return result
    free = np.arange(len(result))
    for index, count in enumerate(counts):
        mine = _spread(int(count), len(free))
        result[free[mine]] = index
        free = free[~mine]
    return result
