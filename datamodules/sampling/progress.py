"""Where a data module stands, counted from completed batches and kept by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray

from ...lightning_compat import logs_now


class Progress(Callback):
    """Counts completed global batches and the rows in them; a data module attaches it to its trainer.

    ``LightningDataModule`` has no hook at the end of a batch, and a loader's position runs ahead of training.

    Args:
        batch_used: Called with every batch that has been used; what it returns is logged.
        step_done: Called after every global batch; what it returns is logged at the trainer's logging interval.

    Attributes:
        step: Completed global batches, over all datasets.
        start: Step at which the current dataset began.
        accumulation: Micro-batches in a global batch.
        rows: Rows used since the dataset began, by corpus, ``(corpora,)``.
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
        self._epoch_steps = 1
        self._restored = False

    def attach(self, trainer: Trainer, accumulation: int, corpora: int, epoch_steps: int) -> None:
        """Joins the trainer's callbacks, in front, so that a checkpoint saved by one of them sees the batch counted.

        Args:
            trainer: Whose batches are counted; another data module's count leaves it.
            accumulation: Micro-batches in a global batch.
            corpora: Number of corpora.
            epoch_steps: Steps of an epoch, where the trainer has no ``max_steps``.
        """
        self.accumulation, self._epoch_steps = accumulation, epoch_steps
        others = [c for c in trainer.callbacks if isinstance(c, Progress) and c is not self]  # type: ignore[attr-defined]
        for other in others:
            trainer.callbacks.remove(other)  # type: ignore[attr-defined]
        if len(self.rows) != corpora:
            self.rows = np.zeros(corpora, dtype=np.int64)
        if self not in trainer.callbacks:  # type: ignore[attr-defined]
            trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]

    def restore(self, step: int, start: int, restored: bool = True) -> None:
        """Takes over what a checkpoint knows. A global batch that was not complete is read again from its start."""
        self.step, self.start, self._micro_batches, self._restored = step, start, 0, restored
        self.rows[:] = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rescales Lightning's own count of batches to the current accumulation.

        It counts micro-batches, and closes a global batch at multiples of the accumulation: restored in the middle of
        one, or with another accumulation, it would close the first one early.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if not self._restored:  # a checkpoint of another data module
            # Lightning counts every optimizer's steps, unless the module sees to it that it does not.
            counted = getattr(pl_module, "counted_optimizers", len(checkpoint["optimizer_states"]))
            step = checkpoint["global_step"] // max(counted, 1)
            self.restore(step=step, start=step)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        current, last = progress["current"], progress["is_last_batch"]
        done = self.step if trainer.max_steps > 0 else (self.step - self.start) % self._epoch_steps
        if trainer.max_steps <= 0 and last and done == 0 and self.step > self.start:
            done = self._epoch_steps  # the epoch is complete: Lightning begins the next one itself
        else:
            last = last and current["ready"] == done * self.accumulation
        done *= self.accumulation
        if current["ready"] in (done, 0):
            return
        # As saved at the end of a batch: everything counted but `completed`, which Lightning adds at restart.
        for counts in (current, progress["total"]):
            counts.update(ready=done, started=done, processed=done, completed=max(done - 1, 0))
        progress["is_last_batch"] = last

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Counts the batch and its rows."""
        if metrics := self._batch_used(batch):
            pl_module.log_dict(metrics, batch_size=1)
        self._micro_batches += 1
        self.rows += np.bincount(batch["corpus"], minlength=len(self.rows))
        if self._micro_batches == self.accumulation:
            self.step += 1
            self._micro_batches = 0
            metrics = self._step_done()
            if metrics and logs_now(trainer):
                pl_module.log_dict(metrics, batch_size=1)
