"""Run the comparison, from data to report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ... import UsageError
from ...preparation.images import prepare_images
from ...preparation.sources.pictures.shapes import PICTURES
from ...preparation.tokenizer import train_tokenizer
from ..jobs import Job
from ..runner import Runner, bring_to_end
from .costs import Cost, costs_of
from .evidence import Evidence
from .jobs import Pictures, Plan, make_jobs
from .ledger import Outcome, Outcomes, PictureLedger
from .recipes import CONFIGS, SHORT_STEPS, read_recipes
from .report import write_report

VOCABULARY = {True: 400, False: 2048}  # of captions, by whether the pictures are drawn shapes


@dataclass(frozen=True)
class Options:
    """Options of the comparison.

    Args:
        out: Folder for data, runs and report.
        seeds: Number of seeds, from 0 on.
        at_once: Number of runs at a time.
        data: Indexed shards of captioned images to train on; None for drawn shapes.
        val: Indexed shards of captioned images for validation.
        image_size: Side in pixels; the recipes' by default.
        tokenizer: Folder of a tokenizer; None to train one on the captions.
        inception: File of Inception's weights, for FID.
        prompts: Number of pictures judged per validation corpus.
        recipes: Folder of recipes; by default those of shapes, or of emoji if data is given.
        short_steps: Number of steps of Stage B's runs with other compressions.
        pictures: Number of pictures drawn per combination of shapes.
        report_only: Whether to run nothing.
        command: Command as typed, for the report.
    """

    out: Path
    seeds: int = 1
    at_once: int = 1
    data: str | None = None
    val: str | None = None
    image_size: int | None = None
    tokenizer: str | None = None
    inception: str | None = None
    prompts: int = 96
    recipes: Path | None = None
    short_steps: int = SHORT_STEPS
    pictures: int = PICTURES
    report_only: bool = False
    command: str = "rewurst reproduce wuerstchen"


def reproduce(options: Options) -> Outcomes:
    """Run all unfinished jobs and write ``report.md``, ``report.json`` and figures, even when stopped.

    Raises:
        UsageError: An option is wrong, or jobs failed; the report is written without them.
    """
    if options.inception is not None and not Path(options.inception).is_file():
        raise UsageError(f"--inception {options.inception} is not a file: give torch-fidelity's Inception weights")
    folder = options.recipes or CONFIGS / ("emoji" if options.data else "shapes")
    recipes = read_recipes(folder, options.image_size)
    pictures = prepare(options)
    plan = Plan(recipes, pictures, options.out, options.prompts, options.inception, options.short_steps)
    costs, seeds = costs_of(recipes, pictures.tokenizer), list(range(options.seeds))
    jobs = make_jobs(plan, costs, seeds)
    runner: Runner[Job, Outcome] = Runner(jobs, PictureLedger(), options.at_once)
    report = partial(_report, options, plan, costs, jobs)
    return bring_to_end(runner, report, options.report_only, "jobs")


def prepare(options: Options) -> Pictures:
    """Draw pictures and train a tokenizer on captions unless they are given or exist already."""
    if options.data is not None and options.val is not None:
        train, val = options.data, {"val": options.val}
        for path in (train, options.val):
            if not (Path(path) / "index.json").is_file():
                raise UsageError(f"{path} has no index.json: index its shards with `rewurst prepare index`")
    else:
        folder = options.out / "data"
        train, val = str(folder / "train"), {"seen": str(folder / "val"), "unseen": str(folder / "unseen")}
        if not all((Path(path) / "index.json").exists() for path in (train, *val.values())):
            prepare_images("builtin:shapes", folder, overwrite=True, pictures=options.pictures)
    drawn = options.data is None
    tokenizer = Path(options.tokenizer or options.out / "tokenizer")
    if options.tokenizer is None and not (tokenizer / "tokenizer.json").exists():
        tars = [str(path) for path in sorted(Path(train).glob("*.tar"))]
        if not tars:
            raise UsageError(f"{train} has no .tar with captions to train a tokenizer on: give --tokenizer")
        train_tokenizer(tars, VOCABULARY[drawn], tokenizer, overwrite=True)
    if not (tokenizer / "tokenizer.json").exists():
        raise UsageError(f"--tokenizer {tokenizer} has no tokenizer.json: give a folder of `rewurst prepare tokenizer`")
    return Pictures(train, val, str(tokenizer), drawn)


def _report(options: Options, plan: Plan, costs: dict[str, Cost], jobs: list[Job], results: Outcomes) -> None:
    evidence = Evidence(plan, costs, list(range(options.seeds)), results)
    write_report(evidence, len(jobs), options.command)
    print(f"{options.out / 'report.md'}: {len(results)} of {len(jobs)} jobs")
