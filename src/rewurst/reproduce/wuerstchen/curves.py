"""Scores over training FLOPs, and how many FLOPs one model needs for what another reaches: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

Curve = Sequence[tuple[float, float]]
"""(training FLOPs, score), in the order of the FLOPs; higher scores are better."""


class EqualScore(NamedTuple):
    """What two models need for the score that both reach.

    Attributes:
        score: The smaller of both final scores.
        first: FLOPs at which the first model reaches it first.
        second: The same of the second.
    """

    score: float
    first: float
    second: float

    @property
    def ratio(self) -> float:
        """How many times as many FLOPs the second model needs."""
        return self.second / self.first


def first_reach(curve: Curve, score: float) -> float | None:
    """FLOPs at which a score is first reached, linearly between the points; none where it never is."""
    if not curve:
        return None
    if curve[0][1] >= score:
        return curve[0][0]
    for (x, y), (x_next, y_next) in pairwise(curve):
        if y < score <= y_next:
            return x + (x_next - x) * (score - y) / (y_next - y)
    return None


def at_equal_score(first: Curve, second: Curve) -> EqualScore | None:
    """FLOPs of both models at the smaller of their final scores; none where one is not known or 0."""
    if not first or not second:
        return None
    score = min(first[-1][1], second[-1][1])
    a, b = first_reach(first, score), first_reach(second, score)
    return None if not a or not b else EqualScore(score, a, b)


def shifted(curve: Curve, flops: float) -> list[tuple[float, float]]:
    """The same curve after FLOPs that were spent before."""
    return [(x + flops, y) for x, y in curve]
