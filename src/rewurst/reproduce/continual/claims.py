"""Claims of both papers, each as one number per seed and a bound that was fixed before any run.

A measure compares runs of the same seed, which share initial weights, pre-training and order of the data. The spread
over seeds is therefore that of the difference, not of the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..verdicts import Claim, NotMeasurable
from . import runs
from .results import LossResult, Results


@dataclass(frozen=True)
class Losses:
    """Losses of one seed by run, on both corpora; every method raises NotMeasurable if a run is missing."""

    results: Results
    seed: int
    old_name: str
    new_name: str

    def old(self, run: str) -> float:
        """Return the final loss on the old corpus."""
        return self._of(run).final(self.old_name)

    def new(self, run: str) -> float:
        """Return the final loss on the new corpus."""
        return self._of(run).final(self.new_name)

    def average(self, run: str) -> float:
        """Return the mean of both final losses."""
        return (self.old(run) + self.new(run)) / 2

    def rise(self, run: str) -> float:
        """Return the largest rise of the loss on the old corpus above its value at the start of the run."""
        (_, begin), *rest = self._of(run).losses[self.old_name]
        return max(loss for _, loss in rest) - begin

    def removed(self, run: str) -> float:
        """Return the share of the forgetting without replay that a run avoids."""
        forgotten = self.old(runs.BASE) - self.old(runs.OLD)
        if forgotten <= 0:
            raise NotMeasurable("nothing is forgotten without replay")
        return (self.old(runs.BASE) - self.old(run)) / forgotten

    def lead(self, fraction: float) -> float:
        """Return how far the constant rate is ahead of re-warming on the old corpus, at a fraction of the runs."""
        rewarmed, constant = (dict(self._of(run).losses[self.old_name]) for run in (runs.BASE, runs.LOW))
        steps = sorted(rewarmed.keys() & constant.keys())
        first, last = steps[0], steps[-1]
        step = next(step for step in steps if step - first >= fraction * (last - first))
        return rewarmed[step] - constant[step]

    def has(self, run: str) -> bool:
        """Return whether a run has ended."""
        return (run, self.seed) in self.results

    def _of(self, run: str) -> LossResult:
        if not self.has(run):
            raise NotMeasurable(run)
        return self.results[run, self.seed]


def of_seeds(results: Results, seeds: Sequence[int], old_name: str, new_name: str) -> list[Losses]:
    """Return the losses of each seed."""
    return [Losses(results, seed, old_name, new_name) for seed in seeds]


def claims(splits: bool = True) -> list[Claim[Losses]]:
    """Return all claims, those about three splits of the new data only if there are any."""
    return [*_forgetting(), *_learning_rates(), *(_chains() if splits else ())]


def _forgetting() -> list[Claim[Losses]]:
    shares = (0.0, *runs.SHARES)
    return [
        Claim(
            "Without replay the old data is forgotten",
            "loss on old after re-warming on the new data, minus the loss before (nats)",
            "+0.27 (SlimPajama), +1.39 (German)",
            lambda run: run.old(runs.BASE) - run.old(runs.OLD),
            at_least=0.0,
        ),
        Claim(
            "More replay means less forgetting",
            f"smallest drop of the loss on old from one share to the next of {_percent(shares)} % (nats)",
            "drops from each to the next; smallest drop 0.01 (SlimPajama), 0.09 (German)",
            lambda run: min(run.old(runs.replay_name(a)) - run.old(runs.replay_name(b)) for a, b in pairwise(shares)),
            at_least=0.0,
        ),
        Claim(
            "5 % replay removes at least half of the forgetting",
            "share of the rise on old that 5 % replay prevents",
            "0.78 (SlimPajama), 0.71 (German)",
            lambda run: run.removed(runs.replay_name(0.05)),
            at_least=0.5,
        ),
        Claim(
            "Up to 25 % replay costs little on the new data",
            "largest change of the loss on new relative to no replay (nats)",
            "at most 0.01 up to 10 % (SlimPajama), 0.05 up to 25 % (German)",
            lambda run: max(abs(run.new(runs.replay_name(s)) - run.new(runs.BASE)) for s in runs.SHARES if s <= 0.25),
            at_most=0.06,
        ),
        Claim(
            "5 % replay, the papers' share for a weak shift, matches training from scratch on both",
            "average loss with 5 % replay, minus that of both from scratch (nats)",
            "+0.02 (SlimPajama), +0.10 (German)",
            lambda run: run.average(runs.replay_name(0.05)) - run.average(runs.BOTH_SCRATCH),
            at_most=0.1,
        ),
        Claim(
            "25 % replay, the papers' share for a strong shift, matches training from scratch on both",
            "average loss with 25 % replay, minus that of both from scratch (nats)",
            "+0.00 (German)",
            lambda run: run.average(runs.replay_name(0.25)) - run.average(runs.BOTH_SCRATCH),
            at_most=0.1,
        ),
        Claim(
            "Starting from the old model helps on the new data",
            "loss on new from scratch, minus that of the re-warmed run (nats)",
            "+0.05 (10B, SlimPajama: 2.05 from scratch, 2.00 re-warmed)",
            lambda run: run.new(runs.NEW_SCRATCH) - run.new(runs.BASE),
            at_least=0.0,
        ),
    ]


def _learning_rates() -> list[Claim[Losses]]:
    peaks = [runs.peak_name(factor) for factor in runs.PEAKS]
    warmups = [runs.warmup_name(warmup) for warmup in runs.WARMUPS]
    return [
        Claim(
            "Re-warming adapts better than a constant low learning rate",
            "loss on new with the constant rate, minus that of the re-warmed run (nats)",
            "the constant rate adapts worst",
            lambda run: run.new(runs.LOW) - run.new(runs.BASE),
            at_least=0.1,
        ),
        Claim(
            "A constant low learning rate forgets less than re-warming",
            "loss on old of the re-warmed run, minus that with the constant rate (nats)",
            "the constant rate forgets least",
            lambda run: run.old(runs.BASE) - run.old(runs.LOW),
            at_least=0.0,
        ),
        Claim(
            "The constant rate's lead on the old data shrinks with time (Gupta)",
            "lead on old at a quarter of the runs, minus that at their end (nats)",
            "it is ahead on the Pile at first, and the lead vanishes in long training",
            lambda run: run.lead(0.25) - run.lead(1.0),
            at_least=0.0,
        ),
        Claim(
            "A higher peak adapts more",
            "smallest drop of the loss on new from half the peak to the peak to twice the peak (nats)",
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
            "The length of the warm-up barely matters",
            f"range of the average loss over warm-ups of {_percent(runs.WARMUPS)} % (nats)",
            "all end at the same loss",
            lambda run: max(map(run.average, warmups)) - min(map(run.average, warmups)),
            at_most=0.05,
        ),
        Claim(
            "Re-warming temporarily raises the loss even on the same data",
            "highest loss on old while learning it again, minus the loss before (nats)",
            "+0.1 (peak 3e-4)",
            lambda run: run.rise(runs.again_name(1.0)),
            at_least=0.0,
        ),
        Claim(
            "... and does not recover from that (Gupta)",
            "loss on old after learning it again, minus the loss before (nats)",
            "the models do not appear to recover",
            lambda run: run.old(runs.again_name(1.0)) - run.old(runs.OLD),
            at_least=0.0,
        ),
        Claim(
            "Re-warming on the same data raises the loss more with a higher peak",
            "the same with twice the peak, minus that with the peak (nats)",
            "+0.1 (+0.2 at 6e-4, +0.1 at 3e-4)",
            lambda run: run.rise(runs.again_name(2.0)) - run.rise(runs.again_name(1.0)),
            at_least=0.0,
        ),
    ]


def _chains() -> list[Claim[Losses]]:
    return [
        Claim(
            f"Over three splits the {name.replace('_', ' ')} schedule keeps up with a chain of cosines",
            "loss on new after the third split, annealed, minus that of the chain (nats)",
            "about the same",
            lambda run, name=name: run.new(runs.split_name(name, 3)) - run.new(runs.split_name(runs.COSINE_CHAIN, 3)),  # type: ignore[misc]
            at_most=0.05,
        )
        for name in runs.INFINITE
    ]


def _percent(shares: Sequence[float]) -> str:
    return ", ".join(f"{share * 100:g}" for share in shares)
