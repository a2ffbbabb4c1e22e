"""Schedules as pure functions of the step.

A step is one completed global batch. The n-th optimizer step uses ``value(n)``, n from 0, so that a run ends at
``value(length)``. Fractions of the length round to whole steps. Every function takes a step or an array of steps and
is exact at the boundaries of phases. Formulas: Ibrahim et al. 2024 (arXiv 2403.08763), sections 4.1 and 7.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "constant",
    "cosine",
    "exponential",
    "infinite_cosine",
    "infinite_inverse_sqrt",
    "inverse_square_root",
    "linear",
    "piecewise",
    "warmup_cosine",
    "warmup_inverse_sqrt",
    "warmup_linear",
    "warmup_stable_decay",
]

Steps = int | float | NDArray[Any]
Phase = tuple[int, Callable[[Steps], Any]]


def linear(step: Steps, length: int, start: float, end: float) -> Any:
    """Interpolate linearly from ``start`` at step 0 to ``end`` at step ``length``, and constantly outside."""
    x = _progress(step, length)
    return _exact_ends(x, start, end, start + (end - start) * x)


def cosine(step: Steps, length: int, start: float, end: float) -> Any:
    """Follow half a cosine from ``start``: ``end + (start - end)/2 (cos(pi x) + 1)``, x = step / length."""
    x = _progress(step, length)
    return _exact_ends(x, start, end, end + (start - end) / 2 * (np.cos(np.pi * x) + 1))


def inverse_square_root(step: Steps, length: int, start: float, end: float, alpha: float = 10.0) -> Any:
    """Follow ``h(x) = 1/sqrt(1 + alpha x) - 1`` from ``start`` to ``end``, scaled by ``h(1)``, x = step / length."""
    x = _progress(step, length)
    ratio = (1 / np.sqrt(1 + alpha * x) - 1) / (1 / np.sqrt(1 + alpha) - 1)
    return _exact_ends(x, start, end, start + (end - start) * ratio)


def exponential(step: Steps, length: int, start: float, end: float) -> Any:
    """Anneal exponentially: ``start (end/start)^x``, x = step / length; both ends must be above zero."""
    x = _progress(step, length)
    return _exact_ends(x, start, end, start * (end / start) ** x)


def constant(step: Steps, length: int, start: float) -> Any:
    """Return ``start`` at every step; the length only gives all phases the same signature."""
    return _exact_ends(_progress(step, length), start, start, start)


def piecewise(step: Steps, phases: Sequence[Phase]) -> Any:
    """Run phases, each ``(steps, function of the step within it)``, one after the other; the last never ends."""
    steps = np.asarray(step, dtype=np.float64)
    result = np.empty_like(steps)
    begin = 0
    for index, (length, function) in enumerate(phases):
        inside = steps >= begin if index else np.ones_like(steps, dtype=bool)
        if index < len(phases) - 1:
            inside &= steps < begin + length
        result[inside] = function(steps[inside] - begin)
        begin += length
    return result if np.ndim(step) else float(result)


def warmup_cosine(step: Steps, length: int, peak: float, minimum: float, warmup: float = 0.01) -> Any:
    """Warm up linearly to ``peak``, then follow a cosine to ``minimum`` at ``length`` (Ibrahim et al., section 4.1)."""
    return _warmup_and(cosine, step, length, peak, minimum, warmup)


def warmup_linear(step: Steps, length: int, peak: float, minimum: float, warmup: float = 0.01) -> Any:
    """Warm up linearly to ``peak``, then decay linearly to ``minimum`` at ``length``."""
    return _warmup_and(linear, step, length, peak, minimum, warmup)


def warmup_inverse_sqrt(
    step: Steps, length: int, peak: float, minimum: float, warmup: float = 0.01, alpha: float = 10.0
) -> Any:
    """Warm up linearly to ``peak``, then decay with the inverse square root to ``minimum`` at ``length``."""
    rise = _whole(warmup, length)
    fall = length - rise
    decay: Phase = (fall, lambda s: inverse_square_root(s, fall, peak, minimum, alpha))
    return piecewise(step, [(rise, lambda s: linear(s, rise, 0.0, peak)), decay])


def warmup_stable_decay(
    step: Steps, length: int, peak: float, minimum: float, warmup: float = 0.01, decay: float = 0.1
) -> Any:
    """Follow WSD: linear warm-up, constant ``peak``, and linear decay over the last ``decay`` of the length."""
    rise, fall = _whole(warmup, length), _whole(decay, length)
    stable = length - rise - fall
    return piecewise(
        step,
        [
            (rise, lambda s: linear(s, rise, 0.0, peak)),
            (stable, lambda s: constant(s, stable, peak)),
            (fall, lambda s: linear(s, fall, peak, minimum)),
        ],
    )


def infinite_cosine(
    step: Steps,
    length: int,
    peak: float,
    constant: float,
    minimum: float,
    warmup: float = 0.01,
    cooldown_until: float = 0.6,
    constant_until: float = 0.85,
) -> Any:
    """Warm up, cool down by cosine to ``constant``, stay, and anneal exponentially to ``minimum`` (section 7.2).

    The fractions are cumulative. Annealing is for a release; the next dataset continues from the constant phase.
    """
    fractions = (warmup, cooldown_until, constant_until)
    return piecewise(step, _infinite(cosine, length, peak, constant, minimum, *fractions))


def infinite_inverse_sqrt(
    step: Steps,
    length: int,
    peak: float,
    constant: float,
    minimum: float,
    warmup: float = 0.01,
    cooldown_until: float = 0.6,
    constant_until: float = 0.85,
    alpha: float = 10.0,
) -> Any:
    """Follow :func:`infinite_cosine` with an inverse-square-root cool-down of steepness ``alpha``."""

    def cool(step: Steps, length: int, start: float, end: float) -> Any:
        return inverse_square_root(step, length, start, end, alpha)

    fractions = (warmup, cooldown_until, constant_until)
    return piecewise(step, _infinite(cool, length, peak, constant, minimum, *fractions))


Decay = Callable[[Steps, int, float, float], Any]


def _infinite(
    cool: Decay,
    length: int,
    peak: float,
    level: float,
    minimum: float,
    warmup: float,
    cooldown_until: float,
    constant_until: float,
) -> list[Phase]:
    rise, cooled, held = (_whole(fraction, length) for fraction in (warmup, cooldown_until, constant_until))
    return [
        (rise, lambda s: linear(s, rise, 0.0, peak)),
        (cooled - rise, lambda s: cool(s, cooled - rise, peak, level)),
        (held - cooled, lambda s: constant(s, held - cooled, level)),
        (length - held, lambda s: exponential(s, length - held, level, minimum)),
    ]


def _warmup_and(decay: Decay, step: Steps, length: int, peak: float, minimum: float, warmup: float) -> Any:
    rise = _whole(warmup, length)
    fall = length - rise
    return piecewise(
        step, [(rise, lambda s: linear(s, rise, 0.0, peak)), (fall, lambda s: decay(s, fall, peak, minimum))]
    )


def _progress(step: Steps, length: int) -> NDArray[Any]:
    return np.clip(np.asarray(step, dtype=np.float64) / max(length, 1), 0.0, 1.0) if length else np.ones(np.shape(step))


def _exact_ends(x: NDArray[Any], start: float, end: float, value: ArrayLike) -> Any:
    """Replace values at and beyond both ends by the given numbers, which rounding in the formula could miss."""
    result = np.where(x <= 0, start, np.where(x >= 1, end, value))
    return result if np.ndim(x) else float(result)


def _whole(fraction: float, length: int) -> int:
    """Return a fraction of the length in whole steps, rounding halves to even."""
    return round(fraction * length)
