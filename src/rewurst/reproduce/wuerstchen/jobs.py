"""Jobs of the comparison: runs of ``rewurst fit``, latents and judging, each identified by a hash of its inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import write_atomically
from ..configs import Config
from ..jobs import Job
from ..keys import KEY_DIGITS, deciding, digest, fingerprint
from .costs import Cost
from .recipes import SHORT_STEPS, Recipes, Where, image_size_of, placed, set_outputs, steps_of, variants, whole_parts

DECIDING = ("LRRewarming", "WeightAverage")
TASK, DONE = "task.json", "done.json"


@dataclass(frozen=True, kw_only=True)
class Task(Job):
    """Job that is a task of :mod:`.work`.

    Args:
        task: Input of the task.
    """

    task: dict[str, Any]

    def command(self) -> list[str]:
        """Write the task into the folder and return the arguments of Python."""
        write_atomically(self.folder / TASK, json.dumps(self.task, indent=1) + "\n")
        return ["-m", "rewurst.reproduce.wuerstchen.work", str(self.folder / TASK)]


def last_checkpoint(job: Job) -> str:
    """Return the last checkpoint of a run that keeps only one."""
    return str(job.folder / "checkpoints" / "last.ckpt")


@dataclass(frozen=True)
class Pictures:
    """Data of the comparison.

    Args:
        train: Folder of training images.
        val: Folders for validation by name.
        tokenizer: Folder of the tokenizer.
        drawn: Whether the pictures are ``builtin:shapes``, whose attributes can be read from them.
    """

    train: str
    val: dict[str, str]
    tokenizer: str
    drawn: bool

    @property
    def content(self) -> Pictures:
        """The same data with hashes of contents instead of paths."""
        val = {name: fingerprint(path) for name, path in self.val.items()}
        tokenizer = digest((Path(self.tokenizer) / "tokenizer.json").read_text(encoding="utf8"))
        return Pictures(fingerprint(self.train), val, tokenizer, self.drawn)


@dataclass(frozen=True)
class Plan:
    """Plan of the comparison, without its seeds.

    Args:
        recipes: Recipes by stage.
        pictures: Data of the comparison.
        out: Folder of all runs.
        prompts: Number of pictures judged per validation corpus.
        inception: File of Inception's weights for FID, if attributes cannot be read.
        short_steps: Number of steps of Stage B's runs with other compressions.
    """

    recipes: Recipes
    pictures: Pictures
    out: Path
    prompts: int = 96
    inception: str | None = None
    short_steps: int = SHORT_STEPS


def baseline_steps(recipes: Recipes, costs: dict[str, Cost]) -> int:
    """Return the steps of the single stage that take about the training FLOPs of Stages B and C together."""
    asked = sum(steps_of(recipes[stage]) * costs[stage].flops_per_step for stage in ("stage_b", "stage_c"))
    return whole_parts(8 * max(1, round(asked / costs["single_stage"].flops_per_step / 8)))


def make_jobs(plan: Plan, costs: dict[str, Cost], seeds: Sequence[int]) -> list[Job]:
    """Return all jobs, each after those that it needs; the timing comes last."""
    jobs = [job for seed in seeds for job in _of_seed(plan, costs, seed)]
    first = {job.kind: job for job in jobs if job.seed == seeds[0]}
    stages = {stage: first[stage] for stage in ("stage_c", "single_stage")}
    runs = {stage: str(job.folder) for stage, job in stages.items()}
    task = {"kind": "timing", "runs": runs, "side": image_size_of(plan.recipes), "cores": os.cpu_count()}
    key = digest([[job.key for job in stages.values()], "timing"])
    folder = plan.out / "runs" / f"timing-{key[:KEY_DIGITS]}"
    timing = Task(kind="timing", seed=seeds[0], key=key, folder=folder, own_steps=1, needs=tuple(jobs), task=task)
    return [*jobs, timing]


def _of_seed(plan: Plan, costs: dict[str, Cost], seed: int) -> list[Job]:
    recipes, pictures, content = plan.recipes, plan.pictures, plan.pictures.content
    here = Where(pictures.train, pictures.val, pictures.tokenizer)
    hashed = Where(content.train, content.val, content.tokenizer)

    def run(kind: str, recipe: Config, steps: int, needs: tuple[Job, ...] = (), keep: bool = False) -> Job:
        named = {job.kind: job for job in needs}
        latents = named.get("latents")
        of_images = latents is None
        where = Where(
            here.train if of_images else str(latents.folder / "train"),  # type: ignore[union-attr]
            here.val if of_images else {name: str(latents.folder / name) for name in here.val},  # type: ignore[union-attr]
            here.tokenizer,
            **{stage: last_checkpoint(job) for stage, job in named.items() if stage in ("stage_a", "stage_b")},
        )
        keys = {stage: job.key for stage, job in named.items() if stage in ("stage_a", "stage_b")}
        by_content = Where(hashed.train, hashed.val, hashed.tokenizer, **keys)
        known = placed(recipe, by_content, seed, steps)
        parts = [known["seed_everything"], known["model"], known["data"], deciding(known["trainer"], DECIDING)]
        key = digest([*parts, [job.key for job in needs]])
        folder = plan.out / "runs" / f"{kind}-seed_{seed}-{key[:KEY_DIGITS]}"
        config = placed(recipe, where, seed, steps)
        set_outputs(config, folder, steps, keep)
        return Job(kind=kind, seed=seed, key=key, folder=folder, own_steps=steps, needs=needs, config=config)

    def work(kind: str, task: dict[str, Any], needs: tuple[Job, ...]) -> Job:
        lasting = {name: value for name, value in task.items() if name not in ("run", "val", "sources", "stage_b")}
        key = digest([lasting, content.val, content.train, [job.key for job in needs]])
        folder = plan.out / "runs" / f"{kind}-seed_{seed}-{key[:KEY_DIGITS]}"
        return Task(kind=kind, seed=seed, key=key, folder=folder, own_steps=1, needs=needs, task=task)

    def judged(job: Job) -> Job:
        task = {"kind": "judge", "run": str(job.folder), "val": pictures.val, "side": side, "prompts": plan.prompts}
        return work(f"judge_{job.kind}", task | {"drawn": pictures.drawn, "inception": plan.inception}, (job,))

    side = image_size_of(recipes)
    a = run("stage_a", recipes["stage_a"], steps_of(recipes["stage_a"]))
    b = run("stage_b", recipes["stage_b"], steps_of(recipes["stage_b"]), (a,))
    sources = {"train": pictures.train, **pictures.val}
    latents = work(
        "latents",
        {"kind": "latents", "sources": sources, "stage_b": last_checkpoint(b), "side": side, "what": "z,a"},
        (b,),
    )
    c = run("stage_c", recipes["stage_c"], steps_of(recipes["stage_c"]), (b, latents), keep=True)
    single = run("single_stage", recipes["single_stage"], baseline_steps(recipes, costs), (a, latents), keep=True)
    short = [run(kind, recipe, whole_parts(plan.short_steps), (a,)) for kind, recipe in variants(recipes).items()]
    comparison = [judged(job) for job in (c, single)] if pictures.drawn or plan.inception else []
    return [a, b, latents, c, single, *comparison, *short, judged(b), *map(judged, short)]
