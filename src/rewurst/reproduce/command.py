"""``rewurst reproduce``: run the papers' experiments on this machine and report which claims held."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .. import UsageError


def continual(
    out: Path,
    scale: Literal["tiny", "small", "405m"] = "tiny",
    seeds: int = 3,
    jobs: int | None = None,
    old: Sequence[str] | None = None,
    new: Sequence[str] | None = None,
    tokenizer: str | None = None,
    report_only: bool = False,
) -> None:
    """Run the experiments of Gupta et al. 2023 and Ibrahim et al. 2024, and report which claims held.

    If stopped or killed, run the same command again to resume.

    Args:
        out: Folder for data, runs and report.
        scale: Size of models and data.
        seeds: Number of seeds; every experiment is run with each.
        jobs: Runs at a time (default: one per core at tiny, else 1).
        old: Sources of the corpus learned first (default: the scale's own).
        new: Sources of the corpus learned next.
        tokenizer: Folder or hub name of a tokenizer (default: one is trained on both corpora).
        report_only: Write the report of the finished runs, and run nothing.
    """
    from .continual.scales import SCALES
    from .continual.study import Options, reproduce

    _at_least_one(seeds=seeds, jobs=jobs)
    if (old is None) != (new is None):
        raise UsageError("--old and --new go together: give both corpora or neither")
    at_once = jobs or SCALES[scale].jobs or os.cpu_count() or 1
    first, second = (list(given) if given else None for given in (old, new))
    reproduce(Options(out, SCALES[scale], seeds, at_once, first, second, tokenizer, report_only))


def wuerstchen(
    out: Path,
    seeds: int = 1,
    jobs: int = 1,
    data: str | None = None,
    val: str | None = None,
    image_size: int | None = None,
    tokenizer: str | None = None,
    inception: str | None = None,
    prompts: int = 96,
    recipes: Path | None = None,
    report_only: bool = False,
) -> None:
    """Compare the cascade of Pernias et al. 2024 with a single stage at equal training FLOPs.

    If stopped or killed, run the same command again to resume.

    Args:
        out: Folder for data, runs and report.
        seeds: Number of seeds; every experiment is run with each.
        jobs: Runs at a time.
        data: Indexed shards of captioned images (default: drawn shapes).
        val: Indexed shards of captioned images for validation.
        image_size: Side in pixels (default: the recipes').
        tokenizer: Folder of a tokenizer of captions (default: one is trained on them).
        inception: File with torch-fidelity's Inception weights, for FID of given data.
        prompts: Number of pictures judged per validation corpus.
        recipes: Folder with stage_{a,b,c}.yaml and single_stage.yaml (default: the built-in ones).
        report_only: Write the report of the finished runs, and run nothing.
    """
    from .wuerstchen.study import Options, reproduce

    _at_least_one(seeds=seeds, jobs=jobs, prompts=prompts, image_size=image_size)
    if (data is None) != (val is None):
        raise UsageError("--data and --val go together: give both folders or neither")
    given = {
        "seeds": seeds, "data": data, "val": val, "image_size": image_size, "tokenizer": tokenizer,
        "inception": inception, "prompts": prompts, "recipes": recipes,
    }  # fmt: skip
    shown = [f"--{name} {value}" for name, value in given.items() if value]
    command = " ".join(["rewurst reproduce wuerstchen", *shown])
    reproduce(Options(out, at_once=jobs, report_only=report_only, command=command, **given))  # type: ignore[arg-type]


def _at_least_one(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}, expected 1 or more")
