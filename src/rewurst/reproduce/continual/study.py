"""Run the experiments on continual pre-training, from data to report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..runner import Runner, bring_to_end
from .corpora import BUILTIN, Data, of_recipe, prepare
from .jobs import RunJob, make_jobs
from .report import write_report
from .results import LossLedger, Results
from .runs import grid
from .scales import Scale


@dataclass(frozen=True)
class Options:
    """Options of the reproduction.

    Args:
        out: Folder for data, runs and report.
        scale: Size of models and data.
        seeds: Number of seeds, from 0 on.
        at_once: Number of runs at a time.
        old: Sources of the old corpus; None for the scale's own.
        new: Sources of the new corpus.
        tokenizer: Folder or hub name; None to train one.
        report_only: Whether to run nothing.
    """

    out: Path
    scale: Scale
    seeds: int = 3
    at_once: int = 1
    old: list[str] | None = None
    new: list[str] | None = None
    tokenizer: str | None = None
    report_only: bool = False


def reproduce(options: Options) -> Results:
    """Run all unfinished runs and write ``report.md``, ``report.json`` and figures, even when stopped.

    Raises:
        UsageError: Runs failed; the report is written without them.
    """
    data = _data(options)
    scale = options.scale
    runs = grid(scale.steps, scale.split_steps, scale.peak, splits=bool(data.splits))
    jobs = make_jobs(runs, list(range(options.seeds)), scale, data, options.out)
    runner = Runner(jobs, LossLedger(), options.at_once)
    runner.finished = lambda results: _report_seed(options, jobs, data, results)
    return bring_to_end(runner, lambda results: _report(options, jobs, data, results), options.report_only)


def _data(options: Options) -> Data:
    if options.old and options.new:
        sources = options.old, options.new
    elif options.scale.data is not None:
        return of_recipe(options.scale)
    else:
        sources = BUILTIN
    return prepare(*sources, options.out / "data", options.scale, options.tokenizer)


def _report_seed(options: Options, jobs: list[RunJob], data: Data, results: Results) -> None:
    """Write the report whenever a seed is complete; figures take too long to draw them after each run."""
    runs = {job.run.name for job in jobs}
    if len(results) < len(jobs) and len(results) % len(runs) == 0:
        _report(options, jobs, data, results)


def _report(options: Options, jobs: list[RunJob], data: Data, results: Results) -> None:
    write_report(options.out, options.scale, jobs, data, results)
    print(f"{options.out / 'report.md'}: {len(results)} of {len(jobs)} runs")
