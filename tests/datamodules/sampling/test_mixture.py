"""The replay share is exact at every step and evenly spread within a batch."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewurst import UsageError
from rewurst.callbacks import WarmupCosine, linear
from rewurst.datamodules.sampling.mixture import UNIT, Mixture, RunningShare

NEW = {"code": 1.0}
OLD = {"prose": 1.0}


def test_five_percent_of_1024_is_51_or_52_for_a_million_steps() -> None:
    mixture = Mixture(1024, NEW, OLD, RunningShare(0.05))
    for begin in (0, 10**5, 10**6 - 200):
        counts = np.diff([mixture.read_before(step)[1] for step in range(begin, begin + 200)])
        assert set(counts.tolist()) <= {51, 52}
    read = int(mixture.read_before(10**6)[1])
    assert abs(read - Fraction(1024 * 10**6) * Fraction(round(0.05 * UNIT), UNIT)) < 1


@pytest.mark.parametrize(
    "share",
    [partial(linear, length=3000, start=0.0, end=0.3), partial(WarmupCosine(0.25, 0.01, 0.1).value, length=3000)],
    ids=["ramp", "cosine"],
)
def test_a_changing_share_drifts_by_less_than_a_row(share: partial[float]) -> None:
    mixture = Mixture(48, NEW, OLD, RunningShare(share))
    asked = 0.0
    for step in range(4000):
        assert abs(int(mixture.read_before(step)[1]) - asked) < 1 + 1e-6
        asked += 48 * share(step)


@settings(max_examples=20, deadline=None)
@given(stop=st.integers(0, 3000), later=st.integers(0, 2000))
def test_running_sums_continue_from_a_restored_one(stop: int, later: int) -> None:
    share = partial(linear, length=2500, start=0.5, end=0.0)
    whole = RunningShare(share)
    restored = RunningShare(share, stop, whole.total(stop))
    assert restored.total(stop + later) == whole.total(stop + later)


weights = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 64), new=weights, old=weights, share=st.floats(0, 1), step=st.integers(0, 10**6))
def test_a_batch_is_what_the_counts_say(size: int, new: list[float], old: list[float], share: float, step: int) -> None:
    mixture = Mixture(
        size,
        {f"new{i}": weight for i, weight in enumerate(new)},
        {f"old{i}": weight for i, weight in enumerate(old)},
        RunningShare(share),
    )
    before, after = mixture.read_before(step), mixture.read_before(step + 1)
    assert (after >= before).all()
    assert (after - before).sum() == size
    corpus, counter = mixture.batch(step)
    for index in range(len(mixture.names)):
        assert counter[corpus == index].tolist() == list(range(before[index], after[index]))


@settings(max_examples=50, deadline=None)
@given(new=weights, steps=st.integers(1, 10**5))
def test_corpora_share_by_weight(new: list[float], steps: int) -> None:
    mixture = Mixture(16, {str(i): weight for i, weight in enumerate(new)})
    read = mixture.read_before(steps)
    for index, weight in enumerate(new):
        assert abs(read[index] - 16 * steps * weight / sum(new)) <= len(new) + 16 * steps * 1e-9


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4, 8, 16, 32]),
    each=st.integers(1, 8),
    share=st.floats(0, 1),
    step=st.integers(0, 1000),
)
def test_contiguous_slices_differ_by_at_most_one_old_row(ranks: int, each: int, share: float, step: int) -> None:
    corpus, _ = Mixture(ranks * each, NEW, OLD, RunningShare(share)).batch(step)
    old = corpus.reshape(ranks, each).sum(1)
    assert old.max() - old.min() <= 1


def test_bad_input() -> None:
    with pytest.raises(UsageError, match=r"corpus 'code': weight 0.0 must be above 0"):
        Mixture(8, {"code": 0.0})
    with pytest.raises(UsageError, match=r"replay share 1.5 at step 3 must be between 0 and 1"):
        RunningShare(lambda step: step / 2).total(4)
    with pytest.raises(UsageError, match="step 2 is before step 5"):
        RunningShare(0.1, 5, 17).total(2)
