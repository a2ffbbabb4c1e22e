"""Schedules against slow oracles written from the papers' formulas, over random parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewurst import UsageError
from rewurst.callbacks import (
    Constant,
    InfiniteCosine,
    InfiniteInverseSqrt,
    Schedule,
    WarmupCosine,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupStableDecay,
    chain,
    cosine,
    exponential,
    infinite_cosine,
    infinite_inverse_sqrt,
    inverse_square_root,
    lambda_lr,
    linear,
    warmup_cosine,
    warmup_inverse_sqrt,
    warmup_linear,
    warmup_stable_decay,
)

rates = st.floats(1e-6, 1.0)
fractions = st.floats(0.0, 1.0)
lengths = st.integers(1, 5000)
steps = st.integers(0, 6000)


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)


def oracle_decay(kind: str, s: float, span: float, high: float, low: float, alpha: float = 10.0) -> float:
    if span == 0 or s >= span:
        return low
    x = s / span
    if kind == "cosine":
        return low + (high - low) / 2 * (math.cos(math.pi * x) + 1)
    if kind == "linear":
        return high * (1 - x) + low * x
    h = lambda y: 1 / math.sqrt(1 + alpha * y) - 1  # noqa: E731  # as the paper writes it
    return high + (low - high) / h(1) * h(x)


@pytest.mark.parametrize(
    ("kind", "function"),
    [("cosine", warmup_cosine), ("linear", warmup_linear), ("sqrt", warmup_inverse_sqrt)],
)
@given(step=steps, length=lengths, peak=rates, ratio=fractions, warmup=fractions)
def test_warmup_and_decay(
    kind: str, function: Any, step: int, length: int, peak: float, ratio: float, warmup: float
) -> None:
    rise = round(warmup * length)
    minimum = peak * ratio
    expected = peak * step / rise if step < rise else oracle_decay(kind, step - rise, length - rise, peak, minimum)
    assert close(function(step, length, peak, minimum, warmup), expected)


@given(step=steps, length=lengths, peak=rates, ratio=fractions, warmup=st.floats(0, 0.5), decay=st.floats(0, 0.5))
def test_warmup_stable_decay(step: int, length: int, peak: float, ratio: float, warmup: float, decay: float) -> None:
    rise, fall = round(warmup * length), round(decay * length)
    minimum = peak * ratio
    if step < rise:
        expected = peak * step / rise
    elif step < length - fall:
        expected = peak
    else:
        expected = oracle_decay("linear", step - (length - fall), fall, peak, minimum)
    assert close(warmup_stable_decay(step, length, peak, minimum, warmup, decay), expected)


@pytest.mark.parametrize(("kind", "function"), [("cosine", infinite_cosine), ("sqrt", infinite_inverse_sqrt)])
@given(
    step=steps,
    length=lengths,
    peak=rates,
    level=st.floats(0.1, 1.0),
    low=st.floats(0.01, 1.0),
    ends=st.lists(fractions, min_size=3, max_size=3).map(sorted),
)
def test_infinite(
    kind: str, function: Any, step: int, length: int, peak: float, level: float, low: float, ends: list[float]
) -> None:
    constant, minimum = peak * level, peak * level * low
    rise, cooled, held = (round(end * length) for end in ends)
    if step < rise:
        expected = peak * step / rise
    elif step < cooled:
        expected = oracle_decay(kind, step - rise, cooled - rise, peak, constant)
    elif step < held:
        expected = constant
    elif step < length:
        expected = constant * (minimum / constant) ** ((step - held) / (length - held))
    else:
        expected = minimum
    assert close(function(step, length, peak, constant, minimum, *ends), expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (662, 1.5e-4), (1324, 3e-4), (1324 + (132366 - 1324) // 2, 1.65e-4), (132366, 3e-5), (200000, 3e-5)],
)
def test_the_405m_run_of_ibrahim_et_al(step: int, expected: float) -> None:
    assert warmup_cosine(step, 132366, 3e-4, 3e-5) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", [InfiniteCosine(3e-4, 1.65e-4, 3e-5), InfiniteInverseSqrt(3e-4, 1.65e-4, 3e-5)])
def test_joints_of_the_infinite_schedules_are_exact(schedule: Schedule) -> None:
    length = 44229
    joints = {round(0.01 * length): 3e-4, round(0.6 * length): 1.65e-4, round(0.85 * length): 1.65e-4, length: 3e-5}
    assert {step: schedule.value(step, length) for step in joints} == joints


@given(length=lengths, start=rates, end=rates)
def test_both_ends_of_every_decay_are_exact(length: int, start: float, end: float) -> None:
    for decay in (linear, cosine, inverse_square_root, exponential):
        assert (decay(0, length, start, end), decay(length, length, start, end)) == (start, end)


SCHEDULES = [
    Constant(1e-3),
    WarmupCosine(3e-4, 3e-5),
    WarmupCosine(3e-4, 3e-5, warmup=0.0),
    WarmupLinear(3e-4, 0.0, 0.1),
    WarmupInverseSqrt(3e-4, 3e-5, alpha=3.0),
    WarmupStableDecay(3e-4, 3e-5),
    InfiniteCosine(3e-4, 1.65e-4, 3e-5),
    InfiniteInverseSqrt(3e-4, 1.65e-4, 3e-5, alpha=5.0),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_arrays_equal_single_steps(schedule: Schedule) -> None:
    values = schedule.value(np.arange(130), 100)
    assert values.shape == (130,)
    assert values.tolist() == [schedule.value(step, 100) for step in range(130)]
    assert isinstance(schedule.value(3, 100), float)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_a_checkpoint_can_rebuild_a_schedule(schedule: Schedule) -> None:
    state = schedule.state()
    assert type(schedule)(**{key: value for key, value in state.items() if key != "name"}) == schedule
    assert schedule.describe().startswith(f"{type(schedule).__name__}(")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WarmupCosine(1e-5, 3e-5), "WarmupCosine: peak 1e-05 is below minimum 3e-05"),
        (lambda: WarmupCosine(0.0, 0.0), "WarmupCosine: peak 0.0 must be above 0"),
        (lambda: WarmupCosine(1.0, -0.1), "WarmupCosine: minimum -0.1 must not be below 0"),
        (lambda: WarmupCosine(1.0, 0.1, 1.5), "warmup 1.5 must be between 0 and 1 (a fraction of the length)"),
        (lambda: WarmupStableDecay(1.0, 0.1, 0.6, 0.5), "warmup 0.6 and decay 0.5 overlap: their sum must be at"),
        (lambda: InfiniteCosine(1.0, 2.0, 0.1), "constant 2.0 must be between minimum 0.1 and peak 1.0"),
        (lambda: InfiniteCosine(1.0, 0.5, 0.0), "minimum 0.0 must be above 0"),
        (
            lambda: InfiniteCosine(1.0, 0.5, 0.1, cooldown_until=0.9, constant_until=0.8),
            "constant_until 0.8 must be between cooldown_until 0.9 and 1",
        ),
        (lambda: InfiniteInverseSqrt(1.0, 0.5, 0.1, alpha=0.0), "alpha 0.0 must be above 0"),
    ],
)
def test_invalid_numbers(build: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_chain_rewarms_at_every_dataset() -> None:
    parts = [(WarmupCosine(3e-4, 3e-5), 1000), (WarmupCosine(1.5e-4, 1.5e-5), 500), (Constant(2e-5), 100)]
    values = chain(np.arange(1600), parts)
    expected = [schedule.value(step, length) for schedule, length in parts for step in range(length)]
    assert values.tolist() == expected
    assert chain(1599, parts) == 2e-5


def test_lambda_lr_follows_the_schedule_in_a_plain_loop() -> None:
    schedule, weights = WarmupCosine(3e-4, 3e-5, 0.1), torch.nn.Parameter(torch.zeros(2))
    bias = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weights]}, {"params": [bias], "lr": 0.02}], lr=0.01)
    scheduler = lambda_lr(optimizer, schedule, 20)
    for step in range(25):
        expected = schedule.value(step, 20)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected, 2 * expected], rel=1e-12)
        optimizer.step()
        scheduler.step()
    with pytest.raises(UsageError, match="has a learning rate of 0"):
        lambda_lr(torch.optim.SGD([bias], lr=0.0), schedule, 20)
