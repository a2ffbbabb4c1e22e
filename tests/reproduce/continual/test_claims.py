"""Verdicts follow from the interval, and claims read the runs that they name."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rewurst.reproduce.continual.claims import claims, of_seeds
from rewurst.reproduce.continual.results import LossResult
from rewurst.reproduce.verdicts import Judged, judge, quantile

Results = dict[tuple[str, int], LossResult]
VALUES = st.lists(st.floats(-5, 5), min_size=2, max_size=12)
BOUND = st.floats(-5, 5)
SEEDS = [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "bounds", "verdict"),
    [
        ([0.2, 0.21, 0.19], {"at_least": 0.1}, "held"),
        ([0.2, 0.21, 0.19], {"at_most": 0.1}, "not held"),
        ([0.2, 0.0, 0.1], {"at_least": 0.09}, "undecided"),
        ([0.2], {"at_least": 0.0}, "undecided"),
        ([], {"at_least": 0.0}, "undecided"),
        ([0.5, 0.5, 0.5], {"at_most": 0.5}, "held"),
        ([0.5, 0.5, 0.5], {"at_least": 0.4, "at_most": 0.45}, "not held"),
    ],
)
def test_verdicts(values: list[float], bounds: dict[str, float], verdict: str) -> None:
    assert judge(values, **bounds).verdict == verdict


def test_the_interval_is_that_of_students_t() -> None:
    """90 % of the means of three normal numbers are within the margin; the table has the usual values."""
    assert (quantile(1), quantile(2), quantile(9)) == (6.314, 2.920, 1.833)
    chance = random.Random(0)
    draws = [[chance.gauss(0, 1) for _ in range(3)] for _ in range(4000)]
    judged = [judge(values) for values in draws]
    inside = sum(abs(each.mean or 0.0) <= (each.margin or 0.0) for each in judged)
    assert inside / len(draws) == pytest.approx(0.9, abs=0.02)


@given(VALUES, BOUND)
def test_opposite_claims_never_both_hold(values: list[float], bound: float) -> None:
    above, below = judge(values, at_least=bound), judge(values, at_most=bound)
    assume(above.margin != 0)
    assert (above.verdict, below.verdict) in {
        ("held", "not held"), ("not held", "held"), ("undecided", "undecided"),
        ("held", "undecided"), ("undecided", "held"),  # an end of the interval is the bound
    }  # fmt: skip


@given(VALUES, BOUND, st.floats(0, 5))
def test_a_weaker_bound_never_loses_what_held(values: list[float], bound: float, less: float) -> None:
    if judge(values, at_least=bound).verdict == "held":
        assert judge(values, at_least=bound - less).verdict == "held"
    if judge(values, at_least=bound).verdict == "not held":
        assert judge(values, at_least=bound + less).verdict == "not held"


@given(VALUES, BOUND)
def test_the_order_of_seeds_does_not_matter_and_spread_is_the_standard_deviation(
    values: list[float], bound: float
) -> None:
    judged, turned = judge(values, at_least=bound), judge(values[::-1], at_least=bound)
    assert judged.spread == pytest.approx(statistics.stdev(values))
    assert judged.mean == pytest.approx(statistics.fmean(values))
    margin = judged.margin or 0.0
    assert margin == pytest.approx(quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))
    assume(abs(abs((judged.mean or 0.0) - bound) - margin) > 1e-9)
    assert judged.verdict == turned.verdict


def judged(results: Results, seeds: list[int] = SEEDS) -> dict[str, Judged]:
    losses = of_seeds(results, seeds, "old", "new")
    return {claim.claim: claim.judged(losses) for claim in claims()}


def verdicts(results: Results, seeds: list[int] = SEEDS) -> dict[str, str]:
    return {claim: each.verdict for claim, each in judged(results, seeds).items()}


WEAK = "5 % replay, the papers' share for a weak shift, matches training from scratch on both"
LEAD = "The constant rate's lead on the old data shrinks with time (Gupta)"
RECOVERY = "... and does not recover from that (Gupta)"
NOT_HELD = {WEAK, LEAD, RECOVERY}  # the trial's shift is strong, its runs are short, and it recovers on the same data


def test_the_trials_numbers_hold(results: Results) -> None:
    found = verdicts(results)
    assert {claim for claim, verdict in found.items() if verdict == "not held"} == NOT_HELD
    assert set(found.values()) == {"held", "not held"}


@pytest.mark.parametrize(
    ("run", "by", "claim"),
    [("replay_5", -0.6, WEAK), ("replay_0", -0.7, LEAD), ("again_peak_1", 0.5, RECOVERY)],
)
def test_claims_hold_with_other_numbers(results: Results, run: str, by: float, claim: str) -> None:
    assert verdicts(change(results, run, "old", by))[claim] == "held"


def change(results: Results, run: str, corpus: str, by: float) -> Results:
    """Return the results with another final loss of a run, in all seeds."""
    changed = dict(results)
    for (name, seed), result in results.items():
        if name == run:
            *curve, (step, loss) = result.losses[corpus]
            changed[name, seed] = replace(result, losses=result.losses | {corpus: [*curve, (step, loss + by)]})
    return changed


@pytest.mark.parametrize(
    ("run", "corpus", "by", "claim"),
    [
        ("replay_0", "old", -2.0, "Without replay the old data is forgotten"),
        ("replay_1", "old", 0.5, "More replay means less forgetting"),
        ("replay_5", "old", 0.8, "5 % replay removes at least half of the forgetting"),
        ("replay_25", "new", 0.1, "Up to 25 % replay costs little on the new data"),
        ("replay_50", "new", 1.0, None),  # beyond 25 %: no claim is about that
        (
            "both_from_scratch", "old", -0.6,
            "25 % replay, the papers' share for a strong shift, matches training from scratch on both",
        ),
        ("new_from_scratch", "new", -0.4, "Starting from the old model helps on the new data"),
        ("constant", "new", -0.3, "Re-warming adapts better than a constant low learning rate"),
        ("constant", "old", 0.8, "A constant low learning rate forgets less than re-warming"),
        ("peak_2", "new", 0.2, "A higher peak adapts more"),
        ("peak_2", "old", -0.4, "A higher peak forgets more"),
        ("warmup_2", "new", 0.2, "The length of the warm-up barely matters"),
        (
            "infinite_cosine_split_3", "new", 0.1,
            "Over three splits the infinite cosine schedule keeps up with a chain of cosines",
        ),
    ],
)  # fmt: skip
def test_each_claim_falls_with_its_runs(results: Results, run: str, corpus: str, by: float, claim: str | None) -> None:
    found = verdicts(change(results, run, corpus, by))
    fallen = {each for each, verdict in found.items() if verdict == "not held"} - NOT_HELD
    assert claim in fallen if claim else not fallen


def test_claims_with_missing_runs_are_undecided(results: Results) -> None:
    two = {name: result for name, result in results.items() if name != ("constant", 2)}
    low = [each for claim, each in judged(two).items() if "constant low" in claim]
    assert [each.seeds for each in low] == [2, 2]
    assert set(verdicts(results, [0]).values()) == {"undecided"}
    assert set(verdicts({}).values()) == {"undecided"}


def test_without_forgetting_no_share_of_it_can_be_removed(results: Results) -> None:
    found = verdicts(change(results, "replay_0", "old", -2.0))
    assert found["5 % replay removes at least half of the forgetting"] == "undecided"


def test_claims_have_one_bound_and_one_name() -> None:
    every = claims()
    assert len({claim.claim for claim in every}) == len(every)
    assert all(claim.bound for claim in every)
