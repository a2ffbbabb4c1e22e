"""Lanes: groups of samples that may share a batch, such as images of one shape.

Every global batch is of one lane, which is a pure function of the step: lanes take turns by weight, as corpora share
slots. Each corpus has a counter for each lane, so that every sample occurs once per epoch of its lane. With a single
lane (text, or images of one shape), counters follow from the step by arithmetic. Otherwise they are summed up from a
step whose counters are known, the step at which a run was restored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .mixture import Mixture, ratios, split


class Lanes:
    """Lane of each step's batch, and the number of samples read from each corpus and lane.

    Args:
        mixture: Mixture that gives the slots of every corpus at a step.
        weights: Weight of each lane.
        lane_of: Lane that each corpus reads from at a step of each lane, ``(corpora, lanes)``; a corpus without samples
            in a lane reads from another one.
        step: Step whose counters are known.
        counts: Samples read before ``step`` from each corpus and lane, ``(corpora, lanes)``.
    """

    def __init__(
        self,
        mixture: Mixture,
        weights: Sequence[float] = (1.0,),
        lane_of: NDArray[np.int64] | None = None,
        step: int = 0,
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        shape = (len(mixture.names), len(weights))
        self.mixture = mixture
        self.lane_of = np.tile(np.arange(shape[1]), (shape[0], 1)) if lane_of is None else lane_of
        self._ratios = ratios({str(lane): weight for lane, weight in enumerate(weights)})
        self._known = (step, np.zeros(shape, dtype=np.int64) if counts is None else counts)
        self._at = self._known

    def __len__(self) -> int:
        return len(self._ratios)

    def lane(self, step: int) -> int:
        """Return the lane of a step's batch."""
        if len(self) == 1:
            return 0
        grown = np.subtract(split(step + 1, self._ratios), split(step, self._ratios))
        return int(grown.argmax())

    def read_before(self, step: int) -> NDArray[np.int64]:
        """Return the samples read before ``step`` from each corpus and lane, ``(corpora, lanes)``."""
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
            counts[corpora, self.lane_of[:, self.lane(now)]] += after - before
            before = after
        self._at = (step, counts)
        return counts.copy()

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return the corpus and lane counter of every slot of a global batch, each ``(G,)``, and the batch's lane."""
        corpus, counter = self.mixture.batch(step)
        lane = self.lane(step)
        if len(self) > 1:
            first = self.read_before(step)[np.arange(len(self.lane_of)), self.lane_of[:, lane]]
            counter = counter + (first - self.mixture.read_before(step))[corpus]
        return corpus, counter, lane
