"""Compare curves of scores over training FLOPs: how many FLOPs one model needs for the score of another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

Curve = Sequence[tuple[float, float]]
"""Points (training FLOPs, score) in the order of the FLOPs; higher scores are better."""


class EqualScore(NamedTuple):
    """FLOPs that two models need for a score that both reach.

    Attributes:
        score: Smaller one of both final scores.
        first: FLOPs at which the first model first reaches the score.
        second: FLOPs at which the second model first reaches the score.
    """

    score: float
    first: float
    second: float

    @property
    def ratio(self) -> float:
        """FLOPs of the second model divided by those of the first."""
        return self.second / self.first


def first_reach(curve: Curve, score: float) -> float | None:
    """Return the FLOPs at which a score is first reached, by linear interpolation; None if it never is."""
    if not curve:
        return None
    if curve[0][1] >= score:
        return curve[0][0]
    for (x, y), (x_next, y_next) in pairwise(curve):
        if y < score <= y_next:
            return x + (x_next - x) * (score - y) / (y_next - y)
    return None


def at_equal_score(first: Curve, second: Curve) -> EqualScore | None:
    """Return the FLOPs of both models at the smaller of their final scores; None if one is unknown or 0."""
    if not first or not second:
        return None
    score = min(first[-1][1], second[-1][1])
    a, b = first_reach(first, score), first_reach(second, score)
    return None if not a or not b else EqualScore(score, a, b)


def shifted(curve: Curve, flops: float) -> list[tuple[float, float]]:
    """Return the curve shifted by FLOPs that were spent before it."""
    return [(x + flops, y) for x, y in curve]
