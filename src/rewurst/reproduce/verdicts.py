"""Decide from the seeds' values whether a claim holds, by comparing an interval with a bound."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

Verdict = Literal["held", "not held", "undecided"]

# 95 % quantiles of Student's t by degrees of freedom from 1 on, for two-sided intervals of 90 %.
_T = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
_T_LARGE = 1.75


@dataclass(frozen=True)
class Judged:
    """Result of a claim over the seeds.

    Args:
        mean: Mean over the seeds; None without seeds.
        spread: Standard deviation over the seeds (n - 1); None with fewer than two.
        margin: Half the width of the 90 % interval of the mean; None with fewer than two.
        seeds: Number of seeds.
        verdict: Verdict by the side of the bound on which the interval is, undecided if on both.
    """

    mean: float | None
    spread: float | None
    margin: float | None
    seeds: int
    verdict: Verdict


def judge(values: Sequence[float], at_least: float | None = None, at_most: float | None = None) -> Judged:
    """Test the mean of ``values``, one per seed, against a bound (or two).

    With one seed the spread is unknown, so nothing is decided.
    """
    count = len(values)
    if count < 2:
        return Judged(values[0] if values else None, None, None, count, "undecided")
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    margin = quantile(count - 1) * spread / math.sqrt(count)
    low, high = mean - margin, mean + margin
    floor, ceiling = -math.inf if at_least is None else at_least, math.inf if at_most is None else at_most
    verdict: Verdict = "undecided"
    if floor <= low and high <= ceiling:
        verdict = "held"
    elif high < floor or low > ceiling:
        verdict = "not held"
    return Judged(mean, spread, margin, count, verdict)


def quantile(degrees: int) -> float:
    """Return the 95 % quantile of Student's t."""
    return _T[degrees - 1] if degrees <= len(_T) else _T_LARGE


Row = dict[str, Any]
E = TypeVar("E")


class NotMeasurable(Exception):  # noqa: N818  # not an error
    """Raised if a run has not finished, or if the results do not define the number."""


@dataclass(frozen=True)
class Claim(Generic[E]):
    """Claim of a paper: one number per seed, and a bound that was fixed before any run.

    Args:
        claim: Text of the claim.
        quantity: Description of the number, with its unit.
        paper: Result of the paper.
        measure: Function that returns the number of a seed's evidence, or raises NotMeasurable.
        at_least: Lowest number with which the claim holds.
        at_most: Highest number with which the claim holds.
    """

    claim: str
    quantity: str
    paper: str
    measure: Callable[[E], float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        """The bound as text."""
        given = {"at least": self.at_least, "at most": self.at_most}
        return " and ".join(f"{side} {value:g}" for side, value in given.items() if value is not None)

    def judged(self, seeds: Iterable[E]) -> Judged:
        """Judge the seeds whose runs have finished."""
        values = []
        for seed in seeds:
            with suppress(NotMeasurable):  # the report shows the number of seeds
                values.append(self.measure(seed))
        return judge(values, self.at_least, self.at_most)

    def row(self, seeds: Iterable[E]) -> Row:
        """Return the claim and its verdict as in ``report.json``."""
        judged = self.judged(seeds)
        return {
            "claim": self.claim,
            "paper": self.paper,
            "ours": judged.mean,
            "spread": judged.spread,
            "verdict": judged.verdict,
            "quantity": self.quantity,
            "bound": self.bound,
            "margin": judged.margin,
            "seeds": judged.seeds,
        }
