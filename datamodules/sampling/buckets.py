"""Lanes: samples of a corpus that may share a batch, such as images of one shape.

Every global batch is of one lane. The lane of a step is a pure function of the step: lanes take turns by weight, as
corpora share slots. Each corpus has a counter for each lane, so that every sample comes once an epoch of its lane.
Where there is one lane only (text, or images of one shape) counters follow from the step by arithmetic. Else they are
summed from a step whose counters are known, which is the step that a run was restored at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .mixture import Mixture, ratios, split


class Lanes:
    """Which lane each step's batch is of, and how far each corpus was read in it.

    Args:
        mixture: Step -> slots of every corpus.
        weights: Of the lanes.
        lane_of: Lane that a corpus reads from at a step of a lane, ``(corpora, lanes)``: another one where it has no
            sample of that lane.
        step: Step whose counters are known.
        counts: Samples of each corpus and lane read before it, ``(corpora, lanes)``.
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
        """Lane of a step's batch."""
        if len(self) == 1:
            return 0
        grown = np.subtract(split(step + 1, self._ratios), split(step, self._ratios))
        return int(grown.argmax())

    def read_before(self, step: int) -> NDArray[np.int64]:
        """Samples of each corpus and lane read in the steps before ``step``, ``(corpora, lanes)``."""
        if len(self) == 1:
            return self.mixture.read_before(step)[:, None]
        if step < self._at[0]:
            self._at = self._known
        at, counts = self._at
        if step < at:
            raise IndexError(f"step {step} lies before step {at}, where this run was restored")
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
        """Corpus and counter within its lane of every slot of a global batch, each ``(G,)``, and the batch's lane."""
        corpus, counter = self.mixture.batch(step)
        lane = self.lane(step)
        if len(self) > 1:
            first = self.read_before(step)[np.arange(len(self.lane_of)), self.lane_of[:, lane]]
            counter = counter + (first - self.mixture.read_before(step))[corpus]
        return corpus, counter, lane
