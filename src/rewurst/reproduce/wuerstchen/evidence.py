"""Collect the runs' results: curves of both models, compressions, and the claims' numbers per seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..verdicts import Claim, NotMeasurable
from .costs import Cost
from .curves import Curve, EqualScore, at_equal_score, shifted
from .jobs import Plan, baseline_steps
from .ledger import Outcomes
from .recipes import image_size_of, ratios_of, shape_of, steps_of, variants

LARGEST_COST = -3.0  # dB
CASCADE, SINGLE = "stage_c", "single_stage"
T = TypeVar("T")


@dataclass(frozen=True)
class Evidence:
    """Results to report on.

    Args:
        plan: Plan of the comparison.
        costs: Costs by stage.
        seeds: Requested seeds.
        outcomes: Outcomes of finished jobs.
    """

    plan: Plan
    costs: dict[str, Cost]
    seeds: Sequence[int]
    outcomes: Outcomes

    @property
    def score(self) -> str | None:
        """Name of the curves' score: ``all`` attributes or ``fid``; None if neither can be judged."""
        return "all" if self.plan.pictures.drawn else "fid" if self.plan.inception else None

    def points(self, model: str, seed: int) -> list[dict[str, Any]]:
        """Return the scores of each checkpoint of a model, with its own steps and training FLOPs."""
        outcome = self.outcomes.get((f"judge_{model}", seed))
        if outcome is None:
            return []
        each = self.costs[model].flops_per_step
        found = sorted((int(step), scores) for step, scores in outcome.values["points"].items())
        return [{"steps": step, "flops": step * each, **scores} for step, scores in found]

    def curve(self, model: str, seed: int) -> Curve:
        """Return the score over training FLOPs, higher is better; shares of correct pictures start at 0."""
        name = self.score
        if name is None:
            return []
        points = [(point["flops"], (-1 if name == "fid" else 1) * point[name]) for point in self.points(model, seed)]
        return [(0.0, 0.0), *points] if points and name == "all" else points

    @property
    def flops_of_b(self) -> float:
        """Training FLOPs of Stage B and the compressor."""
        return steps_of(self.plan.recipes["stage_b"]) * self.costs["stage_b"].flops_per_step

    def flops(self, model: str) -> float:
        """Return the training FLOPs of a whole run."""
        recipes = self.plan.recipes
        steps = baseline_steps(recipes, self.costs) if model == SINGLE else steps_of(recipes[model])
        return steps * self.costs[model].flops_per_step

    def equal(self, seed: int, with_b: bool) -> EqualScore | None:
        """Return the FLOPs of cascade and baseline at equal score, with or without those of Stage B."""
        cascade = self.curve(CASCADE, seed)
        return at_equal_score(shifted(cascade, self.flops_of_b) if with_b else cascade, self.curve(SINGLE, seed))

    def final(self, model: str, seed: int) -> float | None:
        """Return the final score as reported (a smaller FID is better)."""
        points = self.points(model, seed)
        return points[-1][self.score] if points and self.score else None

    def compressions(self, seed: int) -> list[dict[str, Any]]:
        """Return Stage B's runs, the least compressed per side first; the recipe's whole run is last."""
        side, rows = image_size_of(self.plan.recipes), []
        for kind, recipe in variants(self.plan.recipes).items():
            shape = shape_of(recipe, side)
            if (outcome := self.outcomes.get((f"judge_{kind}", seed))) is not None:
                rows.append({"run": kind, "z": list(shape), **ratios_of(shape, side), **outcome.values})
        rows.sort(key=lambda row: (row["per_side"], row["numbers"]))
        if (outcome := self.outcomes.get(("judge_stage_b", seed))) is not None:
            shape = shape_of(self.plan.recipes["stage_b"], side)
            rows.append({"run": "stage_b", "z": list(shape), **ratios_of(shape, side), **outcome.values})
        return rows

    def seconds(self) -> dict[str, float] | None:
        """Return the measured seconds per picture by stage."""
        outcome = self.outcomes.get(("timing", self.seeds[0]))
        return outcome.values["seconds_a_picture"] if outcome else None  # the key in stored results


def breaks_at(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the side ratio from which on the best PSNR is 3 dB below that of the least side ratio; None if none is."""
    best: dict[float, float] = {}
    for row in rows:
        best[row["per_side"]] = max(row["psnr"], best.get(row["per_side"], row["psnr"]))
    worse = [ratio for ratio in sorted(best) if best[ratio] < best[min(best)] + LARGEST_COST]
    return worse[0] if worse else None


OfSeed = tuple[Evidence, int]


def _ratio(with_b: bool) -> Callable[[OfSeed], float]:
    def measure(of: OfSeed) -> float:
        evidence, seed = of
        return _known(evidence.equal(seed, with_b)).ratio

    return measure


def _advantage(of: OfSeed) -> float:
    evidence, seed = of
    better = _known(evidence.final(CASCADE, seed)) - _known(evidence.final(SINGLE, seed))
    return -better if evidence.score == "fid" else better


def _speed(of: OfSeed) -> float:
    evidence, seed = of
    seconds = _known(evidence.seconds() if seed == evidence.seeds[0] else None)
    return seconds["single_stage"] / (seconds["stage_c"] + seconds["stage_b_and_a"])


def _cost_of_compression(of: OfSeed) -> float:
    evidence, seed = of
    rows = [row for row in evidence.compressions(seed) if row["run"] != "stage_b"]
    ratios = sorted({row["per_side"] for row in rows})
    if len(ratios) < 2:
        raise NotMeasurable
    least, most = (max(row["psnr"] for row in rows if row["per_side"] == ratio) for ratio in (ratios[0], ratios[-1]))
    return float(most - least)


def _known(value: T | None) -> T:
    if value is None:
        raise NotMeasurable
    return value


CLAIMS: tuple[Claim[OfSeed], ...] = (
    Claim(
        "At equal accuracy the prior takes fewer training FLOPs than a single stage (Stage B already exists)",
        "training FLOPs of the single stage divided by those of Stage C, at the smaller of the final scores",
        "24,602 A100-hours of Stage C, 200,000 of Stable Diffusion 2.1: 8.1; its own baseline had 25,000 (section 4)",
        _ratio(False),
        at_least=1.0,
    ),
    Claim(
        "... also including Stage B and the compressor",
        "the same divided by those of Stage B and Stage C",
        "35,602 A100-hours (11,000 of them for Stage B*), 200,000: 5.6",
        _ratio(True),
        at_least=1.0,
    ),
    Claim(
        "At equal training FLOPs (B and C together) the cascade follows prompts better",
        "final score of the cascade minus that of the single stage (share of correct pictures; FID: reversed)",
        "FID 23.6, its own baseline 43.5: a U-Net on Stable Diffusion's f8 latents, at equal hours (section 4)",
        _advantage,
        at_least=0.0,
    ),
    Claim(
        "The cascade draws a picture more than twice as fast",
        "seconds per picture of the single stage divided by those of C, B and A",
        "more than twice as fast as Stable Diffusion 2.1",
        _speed,
        at_least=2.0,
    ),
    Claim(
        "Compressing many times per side costs little reconstruction quality",
        "best PSNR at the largest ratio per side, minus that at the smallest (dB)",
        "42.67 per side (section 3.1); reconstructions not reported",
        _cost_of_compression,
        at_least=LARGEST_COST,
    ),
)
