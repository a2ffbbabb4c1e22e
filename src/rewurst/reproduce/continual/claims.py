"""The claims of both papers, each as one number a seed and a bound that was fixed before anything was run.

A measure compares runs of the same seed, which share initial weights, pre-training and order of the data: so the seeds'
spread is that of the difference and not of the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..verdicts import Judged, judge
from .results import Result, Results
from .runs import (
    BASE,
    BOTH_SCRATCH,
    COSINE_CHAIN,
    INFINITE,
    LOW,
    NEW_SCRATCH,
    OLD,
    PEAKS,
    SHARES,
    WARMUPS,
    again_name,
    peak_name,
    replay_name,
    split_name,
    warmup_name,
)


class NotMeasurable(Exception):  # noqa: N818  # no error
    """A run is not there, or the number makes no sense with these losses."""


@dataclass(frozen=True)
class Losses:
    """Losses of one seed by run, on the two corpora; every method raises NotMeasurable where a run is not there."""

    results: Results
    seed: int
    old_name: str
    new_name: str

    def old(self, run: str) -> float:
        """At the end, on the old corpus."""
        return self._of(run).final(self.old_name)

    def new(self, run: str) -> float:
        """At the end, on the new corpus."""
        return self._of(run).final(self.new_name)

    def average(self, run: str) -> float:
        """Mean of both at the end."""
        return (self.old(run) + self.new(run)) / 2

    def rise(self, run: str) -> float:
        """How far the loss on the old corpus rises above where the run begins, at its highest."""
        (_, begin), *rest = self._of(run).losses[self.old_name]
        return max(loss for _, loss in rest) - begin

    def removed(self, run: str) -> float:
        """Share of the forgetting without replay that a run does not show."""
        forgotten = self.old(BASE) - self.old(OLD)
        if forgotten <= 0:
            raise NotMeasurable("nothing is forgotten without replay")
        return (self.old(BASE) - self.old(run)) / forgotten

    def tokens(self, run: str) -> float:
        """Tokens at the end."""
        return self._of(run).tokens

    def _of(self, run: str) -> Result:
        if (run, self.seed) not in self.results:
            raise NotMeasurable(run)
        return self.results[run, self.seed]


Measure = Callable[[Losses], float]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Args:
        claim: What is claimed.
        quantity: What the number is, with its unit.
        paper: What the paper found.
        measure: The number of one seed.
        at_least: Held where the number is not below this.
        at_most: Held where the number is not above this.
    """

    claim: str
    quantity: str
    paper: str
    measure: Measure
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        """The bound in words."""
        parts = [f"at least {self.at_least:g}" if self.at_least is not None else ""]
        parts += [f"at most {self.at_most:g}" if self.at_most is not None else ""]
        return " and ".join(part for part in parts if part)


@dataclass(frozen=True)
class Tested:
    """A claim and what the seeds say."""

    claim: Claim
    judged: Judged


def examine(results: Results, seeds: Sequence[int], old_name: str, new_name: str, splits: bool) -> list[Tested]:
    """Tests every claim on the seeds whose runs are all there."""
    best = best_share(results, seeds, old_name, new_name)
    tested = []
    for claim in claims(best, splits):
        values = []
        for seed in seeds:
            try:
                values.append(claim.measure(Losses(results, seed, old_name, new_name)))
            except NotMeasurable:
                continue  # the report says how many seeds a claim has
        tested.append(Tested(claim, judge(values, claim.at_least, claim.at_most)))
    return tested


def best_share(results: Results, seeds: Sequence[int], old_name: str, new_name: str) -> float:
    """The replay share with the lowest average loss over the seeds: one share for all of them."""
    averages = {}
    for share in SHARES:
        losses = [Losses(results, seed, old_name, new_name) for seed in seeds if (replay_name(share), seed) in results]
        if losses:
            averages[share] = sum(each.average(replay_name(share)) for each in losses) / len(losses)
    return min(averages, key=lambda share: averages[share]) if averages else SHARES[-1]


def claims(best: float = SHARES[-1], splits: bool = True) -> list[Claim]:
    """All claims; ``best`` is the replay share that is compared with training on both from scratch."""
    return [*_forgetting(best), *_learning_rates(), *(_chains() if splits else ())]


def _forgetting(best: float) -> list[Claim]:
    shares = (0.0, *SHARES)
    return [
        Claim(
            "Without replay the old data is forgotten",
            "loss on old after the new data, re-warmed, less that before (nats)",
            "+0.27 (SlimPajama), +1.39 (German)",
            lambda run: run.old(BASE) - run.old(OLD),
            at_least=0.0,
        ),
        Claim(
            "The more is replayed, the less is forgotten",
            f"smallest fall of the loss on old from one share to the next of {_percent(shares)} % (nats)",
            "falls from each to the next; smallest fall 0.01 (SlimPajama), 0.09 (German)",
            lambda run: min(run.old(replay_name(a)) - run.old(replay_name(b)) for a, b in pairwise(shares)),
            at_least=0.0,
        ),
        Claim(
            "5 % replay removes at least half of the forgetting",
            "share of the rise on old that 5 % replay takes away",
            "0.78 (SlimPajama), 0.71 (German)",
            lambda run: run.removed(replay_name(0.05)),
            at_least=0.5,
        ),
        Claim(
            "Up to 25 % replay costs little on the new data",
            "largest change of the loss on new against no replay (nats)",
            "at most 0.01 up to 10 % (SlimPajama), 0.05 up to 25 % (German)",
            lambda run: max(abs(run.new(replay_name(s)) - run.new(BASE)) for s in SHARES if s <= 0.25),
            at_most=0.06,
        ),
        Claim(
            "Continual pre-training matches training from scratch on both",
            f"average loss with {best * 100:g} % replay, the best share, less that of both from scratch (nats)",
            "+0.00 (SlimPajama), -0.02 (German), both with 50 %",
            lambda run: run.average(replay_name(best)) - run.average(BOTH_SCRATCH),
            at_most=0.1,
        ),
        Claim(
            "... at half of its compute on every dataset that follows",
            "tokens of the continued stage over those of both from scratch",
            "0.5",
            lambda run: (run.tokens(replay_name(best)) - run.tokens(OLD)) / run.tokens(BOTH_SCRATCH),
            at_most=0.5,
        ),
        Claim(
            "Starting from the old model helps on the new data",
            "loss on new from scratch, less that of the re-warmed run (nats)",
            "+0.05 (10B, SlimPajama: 2.05 from scratch, 2.00 re-warmed)",
            lambda run: run.new(NEW_SCRATCH) - run.new(BASE),
            at_least=0.0,
        ),
    ]


def _learning_rates() -> list[Claim]:
    peaks = [peak_name(factor) for factor in PEAKS]
    warmups = [warmup_name(warmup) for warmup in WARMUPS]
    return [
        Claim(
            "Re-warming adapts better than a constant low learning rate",
            "loss on new with the constant rate, less that of the re-warmed run (nats)",
            "the constant rate adapts worst",
            lambda run: run.new(LOW) - run.new(BASE),
            at_least=0.1,
        ),
        Claim(
            "A constant low learning rate forgets less than re-warming",
            "loss on old of the re-warmed run, less that with the constant rate (nats)",
            "the constant rate forgets least",
            lambda run: run.old(BASE) - run.old(LOW),
            at_least=0.0,
        ),
        Claim(
            "A higher peak adapts more",
            "smallest fall of the loss on new from half the peak to the peak to twice the peak (nats)",
            "yes (peaks 1.5e-4, 3e-4, 6e-4)",
            lambda run: min(run.new(a) - run.new(b) for a, b in pairwise(peaks)),
            at_least=0.0,
        ),
        Claim(
            "A higher peak forgets more",
            "smallest rise of the loss on old from half the peak to the peak to twice the peak (nats)",
            "yes (peaks 1.5e-4, 3e-4, 6e-4)",
            lambda run: min(run.old(b) - run.old(a) for a, b in pairwise(peaks)),
            at_least=0.0,
        ),
        Claim(
            "The length of the warm-up hardly matters",
            f"range of the average loss over warm-ups of {_percent(WARMUPS)} % (nats)",
            "they end the same",
            lambda run: max(map(run.average, warmups)) - min(map(run.average, warmups)),
            at_most=0.05,
        ),
        Claim(
            "Re-warming raises the loss for a while even on the same data",
            "highest loss on old while learning it again, less that before (nats)",
            "+0.1 (peak 3e-4)",
            lambda run: run.rise(again_name(1.0)),
            at_least=0.0,
        ),
        Claim(
            "... and the more, the higher the peak",
            "the same with twice the peak, less that with the peak (nats)",
            "+0.1 (+0.2 at 6e-4 against +0.1 at 3e-4)",
            lambda run: run.rise(again_name(2.0)) - run.rise(again_name(1.0)),
            at_least=0.0,
        ),
    ]


def _chains() -> list[Claim]:
    def against_chain(schedule: str) -> Measure:
        return lambda run: run.new(split_name(schedule, 3)) - run.new(split_name(COSINE_CHAIN, 3))

    return [
        Claim(
            f"Over three splits the {name.replace('_', ' ')} schedule keeps up with a chain of cosines",
            "loss on new after the third split, annealed, less that of the chain (nats)",
            "about the same",
            against_chain(name),
            at_most=0.05,
        )
        for name in INFINITE
    ]


def _percent(shares: Sequence[float]) -> str:
    return ", ".join(f"{share * 100:g}" for share in shares)
