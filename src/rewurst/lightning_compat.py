"""Every use of Lightning's private names, in one place to look at when Lightning is upgraded (written for 2.6)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

optimizers_to_device = _optimizers_to_device


def logged_step(trainer: Trainer) -> int:
    """Return the step under which loggers record metrics: completed global batches."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def batches_that_stepped(trainer: Trainer) -> int:
    """Return how many batches stepped, in a validation between two of them, which Lightning counts afterwards."""
    return min(logged_step(trainer) + 1, trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def uncount_batch(trainer: Trainer) -> None:
    """Take back the count of a batch: with manual optimization Lightning counts each one as a step."""
    trainer.fit_loop.epoch_loop._batches_that_stepped -= 1


def logs_now(trainer: Trainer) -> bool:
    """Return whether loggers record at this step."""
    return bool(trainer._logger_connector.should_update_logs)


def log_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Send metrics to the loggers at once, outside of a module's own logging."""
    trainer._logger_connector.log_metrics(metrics)  # type: ignore[arg-type]


def publish_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Add to what callbacks may monitor."""
    trainer._logger_connector._callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether the next micro-batch belongs to the same global batch."""
    return bool(trainer.fit_loop._should_accumulate())


def before_first_batch(trainer: Trainer, action: Callable[[], None]) -> None:
    """Call something once, right before a resumed run asks its loader for the first batch.

    After ``on_train_start`` Lightning may still begin an iteration over the validation loaders. It is not called where
    the run begins an epoch, and so an iteration over its own loader, between the two.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    fetch = type(loop)._on_before_fetch

    def first() -> None:
        del loop._on_before_fetch
        trainer.fit_loop._data_fetcher._start_profiler = loop._on_before_fetch  # type: ignore[union-attr]
        begins_epoch = trainer.current_epoch > 0 and not trainer.fit_loop.is_resuming and not loop.restarting
        if not begins_epoch:
            action()
        fetch(loop)

    loop._on_before_fetch = first


def on_weights_only_save(trainer: Trainer, change: Callable[[dict[str, Any]], None]) -> None:
    """Have a function change checkpoints that contain only weights, for which no callback is asked.

    A later call replaces the function of an earlier one.
    """
    connector: Any = trainer._checkpoint_connector
    dump = type(connector).dump_checkpoint

    def dump_checkpoint(weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = dump(connector, weights_only)
        if weights_only:
            change(checkpoint)
        return checkpoint

    connector.dump_checkpoint = dump_checkpoint


def stop_now(trainer: Trainer) -> None:
    """End training after this batch, without another validation and whatever the minimum of steps or epochs is."""
    trainer.should_stop = True
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    trainer.fit_loop.epoch_loop._skip_next_val = True


def keep_samplers(trainer: Trainer) -> None:
    """Keep Lightning from giving each rank a part of a loader that already gives it its own."""
    trainer._accelerator_connector.use_distributed_sampler = False


def launched_rank() -> int:
    """Return this process's rank before there is a Trainer, 0 if no launcher has set one."""
    return _get_rank() or 0


@contextmanager
def validation_from_its_beginning(trainer: Trainer) -> Iterator[Any]:
    """Yield the validation loop, ready to run once from its first batch in the middle of training.

    A restored loop takes itself to be where the checkpoint's validation was. Its state is put back afterwards, because
    the training loop relies on it.
    """
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    before = loop.restarting, loop._has_run, copy.deepcopy(loop.batch_progress.state_dict())
    first = connector._first_loop_iter
    loop.restarting = False
    trainer.validating = True
    yield loop
    trainer.training = True
    connector._first_loop_iter = first
    loop.restarting, loop._has_run, progress = before
    loop.batch_progress.load_state_dict(progress)


def chosen_name(logger: Logger) -> str | None:
    """Return the name that the user gave a run: with Weights & Biases and MLflow ``name`` is the project."""
    name = getattr(logger, "_run_name", None) or getattr(logger, "_name", None)
    return str(name) if name else None


def chosen_version(logger: Logger) -> str | int | None:
    """Return the version (the run's id) that the user gave a logger, None if it will take the next one."""
    given = (getattr(logger, name, None) for name in ("_version", "_id", "_run_id"))
    return next((version for version in given if version is not None), None)


def continue_version(logger: Logger, version: str | int, step: int) -> None:
    """Have a logger that has not begun yet continue an earlier version, if it can without losing anything.

    TensorBoard drops what an interrupted run logged from ``step`` on, which is logged again. ``CSVLogger`` would delete
    the earlier rows, so it takes the next version.
    """
    if isinstance(logger, TensorBoardLogger):
        number = str(version).removeprefix("version_")
        logger._version = int(number) if number.isdigit() and version != number else version
        if logger._kwargs.get("purge_step") is None:
            logger._kwargs["purge_step"] = step
    elif isinstance(getattr(logger, "_wandb_init", None), dict):
        logger._wandb_init["id"] = logger._id = version  # type: ignore[attr-defined]
