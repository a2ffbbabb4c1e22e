"""Samples of a micro-batch before they are read, and the batch that comes of them; without Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Batch = dict[str, Any]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Picks:
    """The samples of a micro-batch.

    Attributes:
        corpus: Of each sample, new corpora first, ``(n,)``.
        row: In its corpus, ``(n,)``.
        seed: Of all that is random about it, ``(n,)``.
        lane: Of the batch.
        training: Whether the model learns from it, rather than being evaluated on it.
        quantile: Of each sample in training, ``(n,)`` in [0, 1): see :func:`~rewurst.datamodules.order.slot_quantiles`.
    """

    corpus: Numbers
    row: Numbers
    seed: Numbers
    lane: int
    training: bool
    quantile: NDArray[np.float64] | None = None


def as_is(batch: Batch) -> Batch:
    """The loader's own conversion would make a tensor, and so a shared memory file, of every array."""
    return batch
