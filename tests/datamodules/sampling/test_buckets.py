"""Batches of one bucket each: every sample once per epoch of its bucket, and counters that resume."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewurst.datamodules.sampling.buckets import Buckets
from rewurst.datamodules.sampling.mixture import Mixture, RunningShare
from rewurst.datamodules.sampling.permutation import slot_quantiles, slot_seeds

LANE_OF = np.array([[0, 1, 2], [0, 1, 1], [2, 2, 2]])


def mixture(share: float, size: int = 8) -> Mixture:
    return Mixture(size, {"new": 3.0, "other": 1.0}, {"old": 1.0}, RunningShare(share))


def make(share: float, step: int = 0, counts: np.ndarray | None = None) -> Buckets:  # type: ignore[type-arg]
    mixed = mixture(share)
    mixed.share = RunningShare(lambda at: share * (at % 7) / 7, step, mixed_sum(share, step))
    return Buckets(mixed, [5.0, 3.0, 1.0], LANE_OF, step, counts)


def mixed_sum(share: float, step: int) -> int:
    return RunningShare(lambda at: share * (at % 7) / 7).total(step)


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), steps=st.integers(1, 60))
def test_counters_of_every_bucket_run_without_gap(share: float, steps: int) -> None:
    buckets = make(share)
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for step in range(steps):
        corpus, counter, bucket = buckets.batch(step)
        for c, n in zip(corpus.tolist(), counter.tolist(), strict=True):
            seen[c, int(LANE_OF[c, bucket])].append(n)
    for counters in seen.values():
        assert sorted(counters) == list(range(len(counters)))
    read = buckets.read_before(steps)
    assert {key: int(read[key]) for key in seen} == {key: len(counters) for key, counters in seen.items()}


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), stop=st.integers(0, 40), later=st.integers(0, 40))
def test_counters_continue_from_restored_ones(share: float, stop: int, later: int) -> None:
    whole = make(share)
    restored = make(share, stop, whole.read_before(stop))
    for ours, theirs in zip(restored.batch(stop + later), whole.batch(stop + later), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(whole.batch(stop)[1], make(share).batch(stop)[1])  # also backwards


def test_buckets_take_turns_by_weight() -> None:
    counts = Counter(make(0.0).bucket(step) for step in range(900))
    assert counts == {0: 500, 1: 300, 2: 100}


def test_one_bucket_is_the_mixture() -> None:
    mixed = mixture(0.25)
    corpus, counter, bucket = Buckets(mixed).batch(10**6)
    assert bucket == 0
    np.testing.assert_array_equal(corpus, mixed.batch(10**6)[0])
    np.testing.assert_array_equal(counter, mixed.batch(10**6)[1])


def test_steps_before_the_restored_one_are_refused() -> None:
    with pytest.raises(IndexError, match="step 3 is before step 5"):
        make(0.0, 5, np.zeros((3, 3), dtype=np.int64)).read_before(3)


def test_seeds_of_slots_never_change() -> None:
    """Golden values: an upgrade must not change crops, dropout and noise of a run silently."""
    assert slot_seeds(7, 3, np.arange(3)).tolist() == GOLDEN
    many = np.concatenate([slot_seeds(0, step, np.arange(1024)) for step in range(200)])
    assert len(np.unique(many)) == len(many)
    assert many.min() >= 0
    bits = (many[:, None] >> np.arange(63)) & 1
    assert abs(bits.mean(0) - 0.5).max() < 0.01


@given(first=st.integers(0, 10**6), count=st.integers(1, 512), step=st.integers(0, 10**6))
def test_quantiles_are_spread_over_any_run_of_slots(first: int, count: int, step: int) -> None:
    """No gap is wider than 1.9 times the average one (the supremum is 1 + 2 / sqrt(5)); and a step moves them."""
    found = slot_quantiles(7, step, np.arange(first, first + count))
    assert found.min() >= 0
    assert found.max() < 1
    around = np.sort(found)
    gaps = np.diff([*around, around[0] + 1])
    assert gaps.max() <= 1.9 / count + 1e-9
    assert np.ptp((slot_quantiles(7, step + 1, np.arange(first, first + count)) - found) % 1) < 1e-9


def test_each_quantile_is_uniform() -> None:
    of_one_slot = np.concatenate([slot_quantiles(0, step, np.arange(5, 6)) for step in range(4000)])
    share = np.histogram(of_one_slot, bins=20, range=(0, 1))[0] / 4000
    assert abs(share - 0.05).max() < 0.02
    assert abs(np.corrcoef(of_one_slot[1:], of_one_slot[:-1])[0, 1]) < 0.06


GOLDEN = [1545595695076747488, 465473946053482362, 252485378673961209]
