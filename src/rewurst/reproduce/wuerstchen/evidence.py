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
from .recipes import image_size_of, ratio_of, shape_of, steps_of, variants

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
        """Return Stage B's runs by size of z, the least compressed first; the recipe's whole run is last."""
        side, rows = image_size_of(self.plan.recipes), []
        for kind, recipe in variants(self.plan.recipes).items():
            shape = shape_of(recipe, side)
            if (outcome := self.outcomes.get((f"judge_{kind}", seed))) is not None:
                rows.append({"run": kind, "z": list(shape), "ratio": ratio_of(shape, side), **outcome.values})
        rows.sort(key=lambda row: row["ratio"])
        if (outcome := self.outcomes.get(("judge_stage_b", seed))) is not None:
            shape = shape_of(self.plan.recipes["stage_b"], side)
            rows.append({"run": "stage_b", "z": list(shape), "ratio": ratio_of(shape, side), **outcome.values})
        return rows

    def seconds(self) -> dict[str, float] | None:
        """Return the measured seconds per picture by stage."""
        outcome = self.outcomes.get(("timing", self.seeds[0]))
        return outcome.values["seconds_a_picture"] if outcome else None  # the key in stored results


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
    near = min(rows, key=lambda row: abs(row["ratio"] - 42.67), default=None)
    if near is None or near is rows[0]:
        raise NotMeasurable
    return float(near["psnr"] - rows[0]["psnr"])


def _known(value: T | None) -> T:
    if value is None:
        raise NotMeasurable
    return value


CLAIMS: tuple[Claim[OfSeed], ...] = (
    Claim(
        "At equal accuracy the prior takes fewer training FLOPs than a single stage (Stage B already exists)",
        "training FLOPs of the single stage divided by those of Stage C, at the smaller of the final scores",
        "24,602 A100-hours of Stage C, 200,000 of Stable Diffusion 2.1: 8.1; no number for its own baseline",
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
        "FID 23.6, its own latent diffusion baseline 43.5*",
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
        "Compressing about 42 times costs little reconstruction quality",
        "PSNR at the compression nearest to 42.67, minus that at the lowest compression (dB)",
        "reconstructions not reported",
        _cost_of_compression,
        at_least=-3.0,
    ),
)
