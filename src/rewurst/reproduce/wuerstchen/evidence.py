"""What the runs found, put together: curves of both models, compressions, the claims' numbers of each seed."""

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
    """What there is to report on.

    Args:
        plan: What was asked for.
        costs: By stage.
        seeds: That were asked for.
        outcomes: Of the jobs that have ended.
    """

    plan: Plan
    costs: dict[str, Cost]
    seeds: Sequence[int]
    outcomes: Outcomes

    @property
    def score(self) -> str | None:
        """What the curves are of: ``all`` attributes, ``fid``, or nothing where neither can be judged."""
        return "all" if self.plan.pictures.drawn else "fid" if self.plan.inception else None

    def points(self, model: str, seed: int) -> list[dict[str, Any]]:
        """Scores of each checkpoint of a model, with the steps and training FLOPs of its own."""
        outcome = self.outcomes.get((f"judge_{model}", seed))
        if outcome is None:
            return []
        each = self.costs[model].flops_a_step
        found = sorted((int(step), scores) for step, scores in outcome.values["points"].items())
        return [{"steps": step, "flops": step * each, **scores} for step, scores in found]

    def curve(self, model: str, seed: int) -> Curve:
        """Score over training FLOPs, higher is better; shares of right pictures begin at 0."""
        name = self.score
        if name is None:
            return []
        points = [(point["flops"], (-1 if name == "fid" else 1) * point[name]) for point in self.points(model, seed)]
        return [(0.0, 0.0), *points] if points and name == "all" else points

    @property
    def flops_of_b(self) -> float:
        """Training FLOPs of Stage B and the compressor."""
        return steps_of(self.plan.recipes["stage_b"]) * self.costs["stage_b"].flops_a_step

    def flops(self, model: str) -> float:
        """Training FLOPs of a whole run."""
        recipes = self.plan.recipes
        steps = baseline_steps(recipes, self.costs) if model == SINGLE else steps_of(recipes[model])
        return steps * self.costs[model].flops_a_step

    def equal(self, seed: int, with_b: bool) -> EqualScore | None:
        """FLOPs of cascade and baseline at equal score, those of Stage B counted or not."""
        cascade = self.curve(CASCADE, seed)
        return at_equal_score(shifted(cascade, self.flops_of_b) if with_b else cascade, self.curve(SINGLE, seed))

    def final(self, model: str, seed: int) -> float | None:
        """Score at the end, as it is read (an FID is better when it is small)."""
        points = self.points(model, seed)
        return points[-1][self.score] if points and self.score else None

    def compressions(self, seed: int) -> list[dict[str, Any]]:
        """Stage B's runs by what z is, from the least compressed on; the recipe's whole run stands last."""
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
        """Seconds a picture, by what was timed."""
        outcome = self.outcomes.get(("timing", self.seeds[0]))
        return outcome.values["seconds_a_picture"] if outcome else None


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
        "At equal accuracy the prior takes fewer training FLOPs than a single stage (Stage B is there already)",
        "training FLOPs of the single stage over those of Stage C, where both reach the smaller final score",
        "24,602 A100-hours of Stage C against 200,000 of Stable Diffusion 2.1: 8.1; no figure for its own baseline",
        _ratio(False),
        at_least=1.0,
    ),
    Claim(
        "... also with Stage B and the compressor counted",
        "the same over those of Stage B and Stage C",
        "35,602 A100-hours (11,000 of them Stage B's*) against 200,000: 5.6",
        _ratio(True),
        at_least=1.0,
    ),
    Claim(
        "At equal training FLOPs (B and C together) the cascade follows prompts better",
        "final score of the cascade less that of the single stage (share of right pictures; FID: the other way round)",
        "FID 23.6 against 43.5 of its own latent diffusion baseline*",
        _advantage,
        at_least=0.0,
    ),
    Claim(
        "The cascade draws a picture more than twice as fast",
        "seconds a picture of the single stage over those of C, B and A",
        "more than twice as fast as Stable Diffusion 2.1",
        _speed,
        at_least=2.0,
    ),
    Claim(
        "Compressing some 42 times costs reconstructions little",
        "PSNR at the compression nearest to 42.67, less that at the least compression (dB)",
        "nobody reports reconstructions",
        _cost_of_compression,
        at_least=-3.0,
    ),
)
