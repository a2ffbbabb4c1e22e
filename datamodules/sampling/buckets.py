"""Buckets: groups of samples that may share a batch, such as images of one shape.

Every global batch is of one bucket, which is a pure function of the step: buckets take turns by weight, as corpora
share slots. Each corpus has a counter for each bucket, so that every sample occurs once per epoch of its bucket. With a
single bucket (text, or images of one shape), counters follow from the step by arithmetic. Otherwise they are summed up
from a step whose counters are known, the step at which a run was restored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .mixture import Mixture, ratios, split


class Buckets:
    """Bucket of each step's batch, and the number of samples read from each corpus and bucket.

    Args:
        mixture: Mixture that gives the slots of every corpus at a step.
        weights: Weight of each bucket.
        bucket_of: Bucket that each corpus reads from at a step of each bucket, ``(corpora, buckets)``; a corpus without
            samples in a bucket reads from another one.
        step: Step whose counters are known.
        counts: Samples read before ``step`` from each corpus and bucket, ``(corpora, buckets)``.
    """

    def __init__(
        self,
        mixture: Mixture,
        weights: Sequence[float] = (1.0,),
        bucket_of: NDArray[np.int64] | None = None,
        step: int = 0,
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        shape = (len(mixture.names), len(weights))
        self.mixture = mixture
        self.bucket_of = np.tile(np.arange(shape[1]), (shape[0], 1)) if bucket_of is None else bucket_of
        self._ratios = ratios({str(bucket): weight for bucket, weight in enumerate(weights)})
        self._known = (step, np.zeros(shape, dtype=np.int64) if counts is None else counts)
        self._at = self._known

    def __len__(self) -> int:
        return len(self._ratios)

    def bucket(self, step: int) -> int:
        """Return the bucket of a step's batch."""
        if len(self) == 1:
            return 0
        grown = np.subtract(split(step + 1, self._ratios), split(step, self._ratios))
        return int(grown.argmax())

    def read_before(self, step: int) -> NDArray[np.int64]:
        """Return the samples read before ``step`` from each corpus and bucket, ``(corpora, buckets)``."""
        if len(self) == 1:
            return self.mixture.read_before(step)[:, None]
        if step < self._at[0]:
            self._at = self._known
        at, counts = self._at
        if step < at:
            raise IndexError(f"step {step} is before step {at}, where this run was restored")
        counts = counts.copy()
        corpora = np.arange(len(counts))
        before = self.mixture.read_before(at)
        for now in range(at, step):
            after = self.mixture.read_before(now + 1)
            counts[corpora, self.bucket_of[:, self.bucket(now)]] += after - before
            before = after
        self._at = (step, counts)
        return counts.copy()

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return corpus and bucket counter of every slot of a global batch, each ``(G,)``, and the batch's bucket."""
        corpus, counter = self.mixture.batch(step)
        bucket = self.bucket(step)
        if len(self) > 1:
            first = self.read_before(step)[np.arange(len(self.bucket_of)), self.bucket_of[:, bucket]]
            counter = counter + (first - self.mixture.read_before(step))[corpus]
        return corpus, counter, bucket
