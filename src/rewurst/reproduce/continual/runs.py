"""Define the experiments of both papers: which run continues which, on which data, with which learning rate.

Gupta et al. 2023 (arXiv 2308.04014) and Ibrahim et al. 2024 (arXiv 2403.08763, Table 2 and section 7). One stage has
``steps`` steps; everything else is a fraction or a multiple of that, and of the peak learning rate. Runs shared by
several questions (the pre-training, the re-warmed run with 1 % warm-up and the middle peak) occur once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..configs import named

Content = Literal["old", "again", "new", "both", "split_1", "split_2", "split_3"]

SHARES = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5)
WARMUPS = (0.0, 0.005, 0.01, 0.02)
PEAKS = (0.5, 1.0, 2.0)
WARMUP = 0.01
MINIMUM = 0.1  # of the peak
CONSTANT = 0.55  # of the peak: 1.65e-4 of 3e-4 (section 7.2)
CONSTANT_UNTIL = 0.85
COSINE_CHAIN = "cosine"
INFINITE = {"infinite_cosine": "InfiniteCosine", "infinite_inverse_sqrt": "InfiniteInverseSqrt"}

OLD, BASE, LOW = "old", "replay_0", "constant"
NEW_SCRATCH, BOTH_SCRATCH = "new_from_scratch", "both_from_scratch"


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        name: Name in files and in the report's JSON.
        title: Name in the report.
        content: Data to learn.
        steps: Number of own steps, after those of the run that it continues.
        schedule: Learning rate schedule, as in a config.
        parent: Run that it continues; None for fresh weights.
        share: Replay share of old data.
        extension: Number of steps added to the constant phase of an infinite schedule.
    """

    name: str
    title: str
    content: Content
    steps: int
    schedule: dict[str, Any]
    parent: str | None = None
    share: float = 0.0
    extension: int = 0


def warmup_name(warmup: float) -> str:
    """Return the name of the run with this warm-up; 1 % is the base run."""
    return BASE if warmup == WARMUP else f"warmup_{warmup * 100:g}"


def peak_name(factor: float) -> str:
    """Return the name of the run re-warmed to this multiple of the peak."""
    return BASE if factor == 1 else f"peak_{factor:g}"


def again_name(factor: float) -> str:
    """Return the name of the run re-warmed on the same data to this multiple of the peak."""
    return f"again_peak_{factor:g}"


def replay_name(share: float) -> str:
    """Return the name of the run with this replay share."""
    return f"replay_{share * 100:g}"


def split_name(schedule: str, split: int) -> str:
    """Return the name of the run over a split (1 to 3) of a chain."""
    return f"{schedule}_split_{split}"


def grid(steps: int, split_steps: int, peak: float, splits: bool = True) -> list[Run]:
    """Return all runs, each after the run that it continues; those needed by most questions come first.

    Args:
        steps: Number of steps per stage.
        split_steps: Number of steps on each of three splits of the new data.
        peak: Peak learning rate of the pre-training.
        splits: Whether there are splits to learn.
    """

    def cosine(factor: float = 1.0, warmup: float = WARMUP) -> dict[str, Any]:
        top = peak * factor
        return named("WarmupCosine", peak=top, minimum=top * MINIMUM, warmup=warmup)

    def on(name: str, title: str, schedule: dict[str, Any], share: float = 0.0, content: Content = "new") -> Run:
        return Run(name, title, content, steps, schedule, OLD, share)

    runs = [
        Run(OLD, "old only (pre-training)", "old", steps, cosine()),
        on(BASE, "re-warmed, no replay", cosine()),
        on(replay_name(0.05), "5 % replay", cosine(), 0.05),
        on(LOW, "constant low learning rate", named("Constant", level=peak * MINIMUM)),
        Run(BOTH_SCRATCH, "both from scratch, summed compute", "both", 2 * steps, cosine()),
        on(replay_name(0.25), "25 % replay", cosine(), 0.25),
        Run(NEW_SCRATCH, "new from scratch", "new", steps, cosine()),
    ]
    runs += [
        on(replay_name(share), f"{share * 100:g} % replay", cosine(), share)
        for share in SHARES
        if share not in (0.05, 0.25)
    ]
    if splits:
        runs += _chains(split_steps, cosine(), peak)
    runs += [on(peak_name(f), f"no replay, {f:g} x the peak", cosine(f)) for f in PEAKS if f != 1]
    runs += [
        on(again_name(f), f"old again, re-warmed to {f:g} x the peak", cosine(f), content="again")
        for f in PEAKS
        if f >= 1
    ]
    runs += [on(warmup_name(w), f"no replay, {w * 100:g} % warm-up", cosine(1, w)) for w in WARMUPS if w != WARMUP]
    return runs


def _chains(steps: int, cosine: dict[str, Any], peak: float) -> Iterable[Run]:
    """Yield runs over three splits in turn: re-warmed cosines and infinite schedules.

    Infinite schedules are annealed only on the last split. On the first two, the constant phase is longer by the steps
    of an annealing, so that all chains see the same number of tokens.
    """
    levels = {"peak": peak, "constant": peak * CONSTANT, "minimum": peak * MINIMUM}
    fractions = {"warmup": WARMUP, "cooldown_until": 0.6, "constant_until": CONSTANT_UNTIL}
    chains = {COSINE_CHAIN: cosine} | {name: named(kind, **levels, **fractions) for name, kind in INFINITE.items()}
    contents: tuple[Content, ...] = ("split_1", "split_2", "split_3")
    for name, schedule in chains.items():
        for number, content in enumerate(contents, 1):
            last = number == len(contents) or name == COSINE_CHAIN
            extension = 0 if last else steps - round(CONSTANT_UNTIL * steps)
            parent = split_name(name, number - 1) if number > 1 else None
            title = f"{name.replace('_', ' ')}, split {number}"
            yield Run(split_name(name, number), title, content, steps, schedule, parent, 0.0, extension)


def total_steps(run: Run, runs: dict[str, Run]) -> int:
    """Return the absolute step at the end of a run: its own steps and those of all runs that it continues."""
    return run.steps + (total_steps(runs[run.parent], runs) if run.parent else 0)
