"""Whether a claim holds, from the values that the seeds gave: an interval against a bound, nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["held", "not held", "undecided"]

# 95 % quantiles of Student's t by degrees of freedom, from 1 on: two-sided intervals of 90 %.
_T = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
_T_LARGE = 1.75


@dataclass(frozen=True)
class Judged:
    """A claim's measure over the seeds.

    Args:
        mean: Mean over the seeds, none without any.
        spread: Standard deviation over the seeds (n - 1), none with fewer than two.
        margin: Half the width of the 90 % interval of the mean, none with fewer than two.
        seeds: How many there were.
        verdict: Whether the whole interval lies on the claim's side of the bound, on the other, or on both.
    """

    mean: float | None
    spread: float | None
    margin: float | None
    seeds: int
    verdict: Verdict


def judge(values: Sequence[float], at_least: float | None = None, at_most: float | None = None) -> Judged:
    """Tests the mean of ``values``, one a seed, against a bound (or two).

    With one seed nothing is known about the spread, so nothing is decided.
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
    """95 % quantile of Student's t."""
    return _T[degrees - 1] if degrees <= len(_T) else _T_LARGE


Row = dict[str, Any]


def claim_row(claim: str, quantity: str, paper: str, bound: str, judged: Judged) -> Row:
    """A claim and what the seeds say of it, as ``report.json`` holds them."""
    return {
        "claim": claim,
        "paper": paper,
        "ours": judged.mean,
        "spread": judged.spread,
        "verdict": judged.verdict,
        "quantity": quantity,
        "bound": bound,
        "margin": judged.margin,
        "seeds": judged.seeds,
    }
