"""Derive the length of the training loader from a Trainer's options, and refuse options that cannot be met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler

from ... import UsageError


@dataclass(frozen=True)
class Epochs:
    """Division of training into epochs.

    Args:
        steps: Number of global batches per epoch.
        whole_run: Absolute step up to which the loader covers the whole run; None if it covers one epoch.
        repeats: Whether every epoch consists of the same batches (``overfit_batches``).
    """

    steps: int
    whole_run: int | None = None
    repeats: bool = False

    def done(self, step: int, start: int) -> int:
        """Return the global batches of the current epoch that are complete.

        Args:
            step: Completed global batches over all datasets.
            start: Step at which the dataset began.
        """
        return step if self.whole_run is not None else (step - start) % self.steps

    def used(self, dataset_step: int) -> int:
        """Return the number of different global batches among the first ``dataset_step`` ones."""
        return min(dataset_step, self.steps) if self.repeats else dataset_step


def epochs_of(trainer: Trainer, one_pass: int, accumulation: int) -> Epochs:
    """Return the epochs that the Trainer's options ask for.

    Without a limit on epochs, a run up to ``max_steps`` is read without interruption.

    Args:
        trainer: Trainer of the run; a fraction in its ``limit_train_batches`` becomes a number of micro-batches.
        one_pass: Number of global batches of one pass over the new corpora.
        accumulation: Number of micro-batches per global batch.

    Raises:
        UsageError: A limit is not a number of whole global batches.
    """
    run: Any = trainer
    name = "overfit_batches" if run.overfit_batches > 0 else "limit_train_batches"
    limit = run.limit_train_batches
    steps = one_pass
    if run.fast_dev_run:
        steps = min(int(run.fast_dev_run), one_pass)
    elif isinstance(limit, int) and limit > 0:
        if limit % accumulation:
            raise UsageError(
                f"{name} {limit} is not a number of whole global batches of {accumulation} micro-batches: use "
                f"{-(-limit // accumulation) * accumulation}"
            )
        steps = min(limit // accumulation, one_pass)
    elif isinstance(limit, float) and 0 < limit < 1:
        steps = int(one_pass * limit)
        if steps < 1:
            raise UsageError(f"{name} {limit} of {one_pass} global batches is less than one: use a larger fraction")
    limited = steps < one_pass or run.overfit_batches > 0
    if limit:
        run.limit_train_batches = steps * accumulation if limited else 1.0
    counts_epochs = run.max_epochs not in (None, -1) or run.min_epochs or run.check_val_every_n_epoch not in (None, 1)
    whole_run = run.max_steps if run.max_steps > 0 and not (limited or counts_epochs) else None
    return Epochs(steps, whole_run, run.overfit_batches > 0)


def refuse_other_batch_sizes(trainer: Trainer) -> None:
    """Refuse callbacks that change the batch size or accumulation, which follow from ``global_batch_size``.

    Raises:
        UsageError: The trainer has such a callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            raise UsageError(
                "GradientAccumulationScheduler contradicts global_batch_size, which sets the accumulation: remove "
                "one of them"
            )
        if isinstance(callback, BatchSizeFinder):
            raise UsageError(
                "the batch size cannot be scaled during training, because a global batch always "
                "has global_batch_size samples: `rewurst plan` finds the largest micro_batch_size"
            )
