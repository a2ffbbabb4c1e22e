"""Runs with a seed as complete configs for ``rewurst fit``, each identified by a hash of what decides its outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configs import Config, named
from ..jobs import Job
from ..keys import KEY_DIGITS, deciding, digest, fingerprint
from .corpora import Corpora, Data
from .runs import Run, total_steps
from .scales import Scale, base_config

DECIDING = ("LRRewarming", "ReplayScheduler")  # the other callbacks of the scales' configs only log and save


@dataclass(frozen=True, kw_only=True)
class RunJob(Job):
    """Job that is a run of the grid with a seed.

    Args:
        run: Run of the grid.
        every: Number of steps between validations.
    """

    run: Run
    every: int

    @property
    def parent(self) -> Job | None:
        """Job that this one continues."""
        return self.needs[0] if self.needs else None

    @property
    def steps(self) -> int:
        """Absolute step at the end."""
        return self.start + self.own_steps

    @property
    def tokens_per_step(self) -> int:
        """Number of predicted tokens per global batch."""
        sizes = self.config["data"]["init_args"]
        return int(sizes["global_batch_size"] * sizes["sequence_length"])


def make_jobs(runs: list[Run], seeds: list[int], scale: Scale, data: Data, out: Path) -> list[RunJob]:
    """Return a job for every run of every seed: all runs of the first seed, then of the next."""
    base, by_name = base_config(scale), {run.name: run for run in runs}
    jobs: dict[tuple[str, int], RunJob] = {}
    for seed in seeds:
        for run in runs:
            parent = jobs[run.parent, seed] if run.parent else None
            jobs[run.name, seed] = _job(run, seed, base, scale, data, out, total_steps(run, by_name), parent)
    return list(jobs.values())


def _job(
    run: Run, seed: int, base: Config, scale: Scale, data: Data, out: Path, steps: int, parent: Job | None
) -> RunJob:
    trainer = base["trainer"] | {"max_steps": steps, "enable_progress_bar": False}
    data_config = _data_config(run, base["data"], data, seed)
    every = interval(run.steps, scale.every)
    trainer["callbacks"] = _callbacks(run, base["trainer"]["callbacks"], data, every)
    config = base | {"seed_everything": seed, "data": data_config, "trainer": trainer}
    key = config_key(config, every, parent.key if parent else "")
    folder = out / "runs" / f"{run.name}-seed_{seed}-{key[:KEY_DIGITS]}"
    trainer["val_check_interval"] = every * _micro_batches(data_config["init_args"], trainer)
    trainer["logger"] = named("TensorBoardLogger", save_dir=str(folder.parent), name=folder.name)
    config["ckpt_path"] = f"auto:{parent.folder}" if parent else "auto"
    return RunJob(
        kind=run.name, seed=seed, key=key, folder=folder, own_steps=run.steps, start=steps - run.steps, config=config,
        needs=(parent,) if parent else (), run=run, every=every,
    )  # fmt: skip


def interval(steps: int, every: int) -> int:
    """Return the divisor of a run's steps nearest to ``every``, so that a validation is at its end."""
    divisors = [number for number in range(1, steps + 1) if steps % number == 0]
    return min(divisors, key=lambda number: abs(math.log(number / every)))


def config_key(config: Config, every: int, parent: str) -> str:
    """Return a hash of everything that decides a run's outcome.

    Corpora are hashed by content, not by path. Loggers, other callbacks and devices, which do not change the outcome,
    are left out: adding a logger does not run everything again.

    Args:
        config: Config of the run.
        every: Number of steps between validations.
        parent: Key of the run that it continues; empty if there is none.
    """
    arguments = dict(config["data"]["init_args"])
    arguments["corpora"] = [
        [name, {**corpus, "path": fingerprint(corpus["path"])}] for name, corpus in arguments["corpora"].items()
    ]
    arguments["val"] = {name: fingerprint(path) for name, path in arguments["val"].items()}
    trainer = deciding(config["trainer"], DECIDING)
    return digest([config["seed_everything"], config["model"], arguments, trainer, every, parent])


def _micro_batches(sizes: Config, trainer: Config) -> int:
    """Return the micro-batches per global batch on one device, in which Lightning's interval counts."""
    devices = trainer.get("devices", "auto")
    if not isinstance(devices, int):
        import torch

        devices = max(1, torch.accelerator.device_count() if torch.accelerator.is_available() else 1)
    rows = int(sizes["micro_batch_size"] * devices * trainer.get("num_nodes", 1))
    return max(1, int(sizes["global_batch_size"]) // rows)


def _callbacks(run: Run, base: list[Config], data: Data, every: int) -> list[Config]:
    """Return the scale's callbacks without sample texts, with this run's learning rate and replay."""
    rewarming = named("LRRewarming", length=run.steps, schedule=run.schedule)
    if run.extension:
        rewarming["init_args"]["constant_extension"] = run.extension
    callbacks = [rewarming]
    for callback in base:
        if callback["class_path"] in ("LRRewarming", "LogText"):  # nobody reads the samples of 81 runs
            continue
        arguments = dict(callback.get("init_args", {}))
        if "every_n_train_steps" in arguments:
            arguments["every_n_train_steps"] = every
        callbacks.append({**callback, **({"init_args": arguments} if arguments else {})})
    if run.share:
        callbacks.append(named("ReplayScheduler", share=run.share))
    if run.parent and run.content in ("new", "again"):
        callbacks.append(named("Forgetting", old=[data.old_name], new=[data.new_name]))
    return callbacks


def _data_config(run: Run, base: Config, data: Data, seed: int) -> Config:
    name, corpora = _content(run, data)
    val = data.val if not run.content.startswith("split") else {data.new_name: data.val[data.new_name]}
    arguments = base["init_args"] | {"dataset": name, "corpora": corpora, "val": dict(val), "seed": seed}
    return base | {"init_args": arguments}


def _content(run: Run, data: Data) -> tuple[str, Corpora]:
    """Return the name of the dataset and its corpora."""
    match run.content:
        case "old":
            return data.old_name, data.old
        case "again":
            return f"{data.old_name}_again", data.old
        case "both":
            return "both", _even(data.old) | _even(data.new)
        case "new":
            replayed: dict[str, Any] = {name: corpus | {"replay": True} for name, corpus in data.old.items()}
            return data.new_name, data.new | (replayed if run.share else {})
        case split:
            return split, data.splits[int(split[-1]) - 1]


def _even(corpora: Corpora) -> Corpora:
    """Return the corpora with weights that add up to 1, so that both sides give equally many tokens."""
    total = sum(corpus.get("weight", 1.0) for corpus in corpora.values())
    return {name: corpus | {"weight": corpus.get("weight", 1.0) / total} for name, corpus in corpora.items()}
