"""The comparison's FLOPs at equal score, steps at equal FLOPs, keys and hours equal numbers worked out by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewurst.reproduce.wuerstchen import recipes as of_recipes
from rewurst.reproduce.wuerstchen.costs import Cost, a100_hours
from rewurst.reproduce.wuerstchen.curves import at_equal_score, first_reach, shifted
from rewurst.reproduce.wuerstchen.evidence import CLAIMS, Evidence, breaks_at
from rewurst.reproduce.wuerstchen.jobs import Pictures, Plan, baseline_steps, last_checkpoint, make_jobs
from rewurst.reproduce.wuerstchen.ledger import Outcome
from rewurst.reproduce.wuerstchen.recipes import CONFIGS, Recipes, parts, read_recipes, whole_parts

COSTS = {
    "stage_a": Cost(1, 1.0, 1.0),
    "stage_b": Cost(1, 5.0, 1.0),
    "stage_c": Cost(1, 20.0, 1.0),
    "single_stage": Cost(1, 25.0, 1.0),
}


@pytest.mark.parametrize(
    ("curve", "score", "expected"),
    [
        ([(0, 0.0), (10, 0.5), (20, 1.0)], 0.25, 5.0),
        ([(0, 0.0), (10, 0.5), (20, 1.0)], 0.5, 10.0),
        ([(0, 0.0), (10, 0.5), (20, 1.0)], 1.1, None),
        ([(0, 0.0), (10, 0.8), (20, 0.2), (30, 0.9)], 0.4, 5.0),  # first, although it falls again
        ([(0, 0.0), (10, 0.8), (20, 0.2), (30, 0.9)], 0.85, 20 + 10 * 0.65 / 0.7),
        ([(10, -40.0), (20, -30.0)], -50.0, 10.0),  # an FID that the first point is below already
        ([(10, -40.0), (20, -30.0)], -32.0, 18.0),
        ([], 0.5, None),
    ],
)
def test_where_a_score_is_first_reached(curve: list[tuple[float, float]], score: float, expected: float | None) -> None:
    assert first_reach(curve, score) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0, 1))
def test_first_reach_is_the_first_crossing_of_a_fine_grid(scores: list[float], score: float) -> None:
    curve = [(10.0 * i, y) for i, y in enumerate(scores)]
    found, x = first_reach(curve, score), np.linspace(0, curve[-1][0], 20_001)
    reached = np.flatnonzero(np.interp(x, *zip(*curve, strict=True)) >= score)
    if found is None:
        assert max(scores) < score
    else:
        assert np.interp(found, *zip(*curve, strict=True)) == pytest.approx(score, abs=1e-6) or found == 0
        assert not len(reached) or found <= x[reached[0]] + 1e-9


def test_the_ratio_is_taken_at_the_smaller_final_score() -> None:
    cascade, single = [(0.0, 0.0), (10.0, 0.8)], [(0.0, 0.0), (20.0, 0.2), (40.0, 0.4)]
    equal = at_equal_score(cascade, single)
    assert equal is not None
    assert equal == (0.4, 5.0, 40.0)
    assert equal.ratio == 8
    with_b = at_equal_score(shifted(cascade, 15), single)
    assert with_b is not None
    assert with_b.ratio == 2
    assert at_equal_score([], single) is None
    assert at_equal_score([(0.0, 0.0), (9.0, 0.0)], single) is None, "nothing was learnt"


@pytest.fixture
def recipes() -> Recipes:
    return read_recipes(CONFIGS / "shapes")


@pytest.fixture
def plan(recipes: Recipes, tmp_path: Path) -> Plan:
    for name in ("train", "seen", "unseen", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("tokenizer.json" if name == "tokenizer" else "index.json")).write_text(name)
    val = {name: str(tmp_path / name) for name in ("seen", "unseen")}
    pictures = Pictures(str(tmp_path / "train"), val, str(tmp_path / "tokenizer"), drawn=True)
    return Plan(recipes, pictures, tmp_path / "out")


def test_the_single_stage_takes_the_flops_of_b_and_c(recipes: Recipes) -> None:
    b, c = (recipes[stage]["trainer"]["max_steps"] for stage in ("stage_b", "stage_c"))
    assert baseline_steps(recipes, COSTS) * 25 == pytest.approx(5 * b + 20 * c, abs=25 * 8)


@pytest.mark.parametrize("steps", [1500, 2400, 1000, 7, 4, 1999, 1])
def test_runs_are_divided_into_equal_parts(steps: int) -> None:
    whole = whole_parts(steps)
    assert whole % parts(whole) == 0
    assert parts(whole) >= 4
    assert whole <= max(steps, 4)
    assert steps - whole < 8


def test_jobs_come_after_what_they_need_and_read_its_files(plan: Plan) -> None:
    jobs = make_jobs(plan, COSTS, [0, 1])
    place = {job.name: index for index, job in enumerate(jobs)}
    assert len(place) == len({job.folder for job in jobs}) == len(jobs)
    assert all(place[other.name] < place[job.name] for job in jobs for other in job.needs)
    known = {job.name: job for job in jobs}
    single, latents = known["single_stage", 1], known["latents", 1]
    assert single.config["model"]["init_args"]["stage_a"] == last_checkpoint(known["stage_a", 1])
    assert single.config["data"]["init_args"]["corpora"] == {"shapes": {"path": str(latents.folder / "train")}}
    assert single.config["seed_everything"] == single.config["data"]["init_args"]["seed"] == 1
    rewarming = single.config["trainer"]["callbacks"][0]["init_args"]
    assert rewarming["length"] == single.config["trainer"]["max_steps"] == single.own_steps
    compressors = {
        kind: job.config["model"]["init_args"]["compressor"]["c_latent"]
        for (kind, seed), job in known.items()
        if kind.startswith("stage_b_") and seed == 0
    }
    assert {kind: int(kind.removeprefix("stage_b_").split("x")[0]) for kind in compressors} == compressors
    assert {"stage_b_4x8x8", "stage_b_2x8x8", "stage_b_4x4x4", "stage_b_16x8x8"} <= set(compressors)


def test_keys_change_with_what_decides_an_outcome(plan: Plan, tmp_path: Path) -> None:
    def keys(changed: Plan) -> dict[tuple[str, int], str]:
        return {job.name: job.key for job in make_jobs(changed, COSTS, [0])}

    def with_change(stage: str, **settings: Any) -> Plan:
        recipes = copy.deepcopy(plan.recipes)
        recipes[stage]["model"]["init_args"] |= settings
        return replace(plan, recipes=recipes)

    known = keys(plan)
    assert keys(replace(plan, out=tmp_path / "elsewhere")) == known
    logged = copy.deepcopy(plan.recipes)
    logged["stage_c"]["trainer"]["log_every_n_steps"] = 7
    assert keys(replace(plan, recipes=logged)) == known
    of_c = keys(with_change("stage_c", high_noise_share=0.123))
    assert {name for name, _ in known if known[name, 0] != of_c[name, 0]} == {"stage_c", "judge_stage_c", "timing"}
    of_b = keys(with_change("stage_b", noise_share=0.123))
    assert {"stage_b", "latents", "stage_c", "single_stage"} <= {n for n, _ in known if known[n, 0] != of_b[n, 0]}
    assert of_b["stage_a", 0] == known["stage_a", 0]


def test_claims_come_from_the_points(plan: Plan) -> None:
    def scores(**by_step: float) -> Outcome:
        points = {step[1:]: {"all": value} for step, value in by_step.items()}
        return Outcome(key="", values={"points": points}, seconds=1.0)

    steps = plan.recipes["stage_c"]["trainer"]["max_steps"]
    seconds = {"stage_c": 1.0, "stage_b_and_a": 1.0, "stage_a": 0.5, "single_stage": 5.0}
    outcomes = {
        ("judge_stage_c", 0): scores(**{f"s{steps}": 0.8}),
        ("judge_single_stage", 0): scores(s100=0.1, s1000=0.4),
        ("timing", 0): Outcome(key="", values={"seconds_a_picture": seconds}, seconds=1.0),
    }
    evidence = Evidence(plan, COSTS, [0], outcomes)
    c_alone, with_b, advantage, speed, compression = (claim.judged([(evidence, 0)]) for claim in CLAIMS)
    flops_c, flops_b = steps * 20.0, plan.recipes["stage_b"]["trainer"]["max_steps"] * 5.0
    assert c_alone.mean == pytest.approx(25_000 / (flops_c / 2))
    assert with_b.mean == pytest.approx(25_000 / (flops_b + flops_c / 2))
    assert advantage.mean == pytest.approx(0.4)
    assert speed.mean == pytest.approx(2.5)
    assert compression.mean is None
    assert {each.verdict for each in (c_alone, with_b, advantage, speed)} == {"undecided"}


def test_the_papers_hours() -> None:
    hours = a100_hours()
    assert hours["flops_at_most"] == pytest.approx(24_602 * 3600 * 312e12)
    pictures_at_24 = 364_000 * 1536 + 4_000 * 768 + 50_000 * 384
    # 6 FLOPs per parameter and place are less than counted: attention and the texts are added.
    floor = 6 * 0.9e9 * (500_000 * 1536 * 12**2 + pictures_at_24 * 24**2)
    assert 1 < hours["flops_counted"] / floor < 2
    assert hours["mfu_counted"] == pytest.approx(hours["flops_counted"] / hours["flops_at_most"])


def test_compressions_change_only_z(recipes: Recipes) -> None:
    found = of_recipes.variants(recipes)
    ratios = [of_recipes.ratios_of(of_recipes.shape_of(recipe, 64), 64) for recipe in found.values()]
    assert {ratio["per_side"] for ratio in ratios} == {8, 16, 32}
    assert {round(ratio["numbers"]) for ratio in ratios} >= {12, 48, 96, 192}
    for recipe in found.values():
        model = recipe["model"]["init_args"]
        assert model["unet"]["effnet_embd"] == of_recipes.shape_of(recipe, 64)[0]


def test_the_papers_42_is_per_side() -> None:
    ratios = of_recipes.ratios_of((16, 24, 24), 1024)
    assert {name: round(ratio, 1) for name, ratio in ratios.items()} == {
        "per_side": 42.7,
        "positions": 1820.4,
        "numbers": 341.3,
    }


@pytest.mark.parametrize(
    ("psnr", "expected"),
    [({8: 25.0, 16: 23.0, 32: 19.0}, 32), ({8: 25.0, 16: 21.9, 32: 19.0}, 16), ({8: 25.0, 16: 24.0}, None), ({}, None)],
)
def test_the_side_ratio_at_which_reconstructions_break(psnr: dict[int, float], expected: int | None) -> None:
    rows = [{"per_side": ratio, "psnr": value} for ratio, value in psnr.items()]
    rows += [{"per_side": ratio, "psnr": value - 5} for ratio, value in psnr.items()]  # fewer channels
    assert breaks_at(rows) == expected
