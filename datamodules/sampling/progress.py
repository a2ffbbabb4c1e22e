"""Track the position of a data module by counting completed batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray

from ...lightning_compat import logs_now
from .trainer_limits import Epochs


class Progress(Callback):
    """Counter of completed global batches and their rows, which a data module attaches to its trainer.

    ``LightningDataModule`` has no hook at the end of a batch, and a loader's position runs ahead of training.

    Args:
        batch_used: Function called with every batch after its use; its result is logged.
        step_done: Function called after every global batch; its result is logged at the trainer's logging interval.

    Attributes:
        step: Completed global batches, over all datasets.
        start: Step at which the current dataset began.
        accumulation: Micro-batches in a global batch.
        rows: Rows used since the dataset began, by corpus, ``(corpora,)``.
        epochs: How the run is divided into epochs.
        rows_of: Function from the number of a micro-batch to its rows from each corpus.
        limits: ``limit_train_batches`` as set by the user and as set by the data module.
    """

    def __init__(
        self,
        batch_used: Callable[[dict[str, Any]], dict[str, float]],
        step_done: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self._batch_used, self._step_done = batch_used, step_done
        self.step = 0
        self.start = 0
        self.accumulation = 1
        self.rows: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._micro_batches = 0
        self.epochs = Epochs(1)
        self.limits: tuple[Any, Any] = (None, None)
        self.rows_of: Callable[[int], NDArray[np.int64]] = _unknown
        self._restored = False

    def attach(self, trainer: Trainer, accumulation: int, corpora: int, epochs: Epochs) -> None:
        """Insert this as the trainer's first callback, so that checkpoints saved by the others include the batch.

        Args:
            trainer: Trainer whose batches to count; another data module's counter is removed from it.
            accumulation: Micro-batches in a global batch.
            corpora: Number of corpora.
            epochs: How the run is divided into epochs.
        """
        self.accumulation, self.epochs = accumulation, epochs
        others = [c for c in trainer.callbacks if isinstance(c, Progress) and c is not self]  # type: ignore[attr-defined]
        for other in others:
            trainer.callbacks.remove(other)  # type: ignore[attr-defined]
        if len(self.rows) != corpora:
            self.rows = np.zeros(corpora, dtype=np.int64)
        if self not in trainer.callbacks:  # type: ignore[attr-defined]
            trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]

    def restore(self, step: int, start: int, restored: bool = True) -> None:
        """Restore the position of a checkpoint. An incomplete global batch is read again from its start."""
        self.step, self.start, self._micro_batches, self._restored = step, start, 0, restored
        self.rows[:] = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rescale Lightning's own count of batches to the current accumulation.

        Lightning counts micro-batches and ends a global batch at multiples of the accumulation: if restored within one,
        or with another accumulation, it would end the first one early.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if not self._restored:  # the checkpoint is from another data module
            # Lightning counts every optimizer's steps, unless the module prevents it.
            counted = getattr(pl_module, "counted_optimizers", len(checkpoint["optimizer_states"]))
            step = checkpoint["global_step"] // max(counted, 1)
            self.restore(step=step, start=step)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        current, last = progress["current"], progress["is_last_batch"]
        done = self.epochs.done(self.step, self.start)
        if last and done == 0 and self.step > self.start:
            done = self.epochs.steps  # the epoch is complete: Lightning begins the next one itself
        else:
            last = last and current["ready"] == done * self.accumulation
        done, total = done * self.accumulation, self.step * self.accumulation
        if current["ready"] == 0 or (current["ready"], progress["total"]["ready"]) == (done, total):
            return
        # As saved at the end of a batch: all counts are final except `completed`, which Lightning adds at restart.
        for counts, ready in ((current, done), (progress["total"], total)):
            counts.update(ready=ready, started=ready, processed=ready, completed=max(ready - 1, 0))
        progress["is_last_batch"] = last

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Count the batch and its rows."""
        if metrics := self._batch_used(batch):
            pl_module.log_dict(metrics, batch_size=1)
        self._micro_batches += 1
        if isinstance(batch, dict) and "corpus" in batch:
            self.rows += np.bincount(batch["corpus"], minlength=len(self.rows))
        else:  # a project's own batch, which has no origin of its samples
            step = self.epochs.done(self.step, self.start) + self.start if self.epochs.repeats else self.step
            self.rows += self.rows_of(step * self.accumulation + self._micro_batches - 1)
        if self._micro_batches == self.accumulation:
            self.step += 1
            self._micro_batches = 0
            metrics = self._step_done()
            if metrics and logs_now(trainer):
                pl_module.log_dict(metrics, batch_size=1)


def _unknown(number: int) -> NDArray[np.int64]:
    """Raise until there is a loader."""
    raise IndexError(number)
