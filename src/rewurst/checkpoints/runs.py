"""Identify the run of a Trainer by its name, dataset and folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from ..lightning_compat import chosen_name, chosen_version, continue_version

CSV = "metrics.csv"
KEY = "run"
"""Key under which a checkpoint stores the run that saved it."""


class RunIdentity(Callback):
    """Callback that stores the run's name and dataset in checkpoints, to tell apart runs that share a folder.

    A resumed run also learns the path of its last checkpoint: periodic checkpoints do not store it, and Lightning would
    call the next one ``last-v1.ckpt``.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the run's name and dataset."""
        checkpoint[KEY] = {"name": run_name(trainer), "dataset": dataset_of(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the path of the last checkpoint if it is missing."""
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback.dirpath:
                continue
            state = checkpoint["callbacks"].get(callback.state_key, {})
            last = os.path.join(callback.dirpath, callback.CHECKPOINT_NAME_LAST + callback.FILE_EXTENSION)
            if state.get("dirpath") == callback.dirpath and not state["last_model_path"] and os.path.lexists(last):
                state["last_model_path"] = last


def run_name(trainer: Trainer) -> str | None:
    """Return the user's name of the run; None if no logger has one."""
    return next((name for logger in trainer.loggers if (name := chosen_name(logger))), None)


def dataset_of(trainer: Trainer) -> str | None:
    """Return the name of the data module's dataset; None if it has none."""
    dataset = getattr(getattr(trainer, "datamodule", None), "dataset", None)
    return dataset if isinstance(dataset, str) else None


def stored_dataset(content: Mapping[str, Any]) -> str | None:
    """Return the dataset with which a checkpoint was saved; None if unknown."""
    states = [content.get(KEY), *(state for name, state in content.items() if name.endswith("DataModule"))]
    states += (content.get("callbacks") or {}).values()
    for state in states:
        if isinstance(state, Mapping) and isinstance(state.get("dataset"), str):
            return str(state["dataset"])
    return None


def stored_name(content: Mapping[str, Any]) -> str | None:
    """Return the name of the run that saved a checkpoint; None if unknown."""
    return (content.get(KEY) or {}).get("name")


def run_folder(trainer: Trainer) -> Path | None:
    """Return the folder that only this run writes to; None if nothing is to be written.

    ``ModelCheckpoint`` uses the same one: ``save_dir/name/version`` of the first logger. Every process has to call
    this function.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    folder = version_folder(trainer.loggers[0], trainer) if trainer.loggers else Path(trainer.default_root_dir)
    return Path(trainer.strategy.broadcast(str(folder)))


def version_folder(logger: Logger, trainer: Trainer) -> Path:
    """Return the folder of a logger's current version."""
    if log_dir := getattr(logger, "log_dir", None):
        return Path(str(log_dir))
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(str(logger.save_dir or trainer.default_root_dir)) / str(logger.name) / version


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Return the folders of this run's checkpoints: the loggers', over all versions, and the callbacks'.

    A version chosen by the user counts as a separate run.
    """
    folders = [_logger_folder(logger, trainer) for logger in trainer.loggers]
    explicit = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folders += [Path(str(folder)) for folder in explicit if folder]
    return folders or [Path(trainer.default_root_dir) / "checkpoints"]  # where Lightning saves without a logger


def _logger_folder(logger: Logger, trainer: Trainer) -> Path:
    if chosen_version(logger) is not None:
        return version_folder(logger, trainer)
    root = getattr(logger, "root_dir", None)
    return Path(str(root)) if root else Path(str(logger.save_dir or trainer.default_root_dir)) / str(logger.name)


def resume_version(trainer: Trainer, checkpoint: Path, step: int) -> None:
    """Make loggers continue the version of a checkpoint, so that the run stays one curve.

    Args:
        trainer: Trainer before ``fit``.
        checkpoint: Checkpoint to resume from.
        step: Number of completed global batches at the checkpoint.
    """
    for logger in trainer.loggers:
        folder, version = _logger_folder(logger, trainer), chosen_version(logger)
        if isinstance(logger, CSVLogger) and version is not None:
            keep_rows(folder)
        elif checkpoint.is_relative_to(folder):
            inside = checkpoint.relative_to(folder).parts
            continue_version(logger, inside[0] if version is None else version, step)


def keep_rows(folder: Path) -> None:
    """Move the metrics of an interrupted run to ``metrics.1.csv``: ``CSVLogger`` would delete them."""
    path = folder / CSV
    if path.is_file():
        path.rename(next(other for n in count(1) if not (other := folder / f"metrics.{n}.csv").exists()))
