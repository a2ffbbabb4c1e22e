"""Training that logs loss and gradient norm per global batch and stops if they are not finite.

The host never waits for the device between logging intervals: values stay on the device and are checked together, at
the logging interval and before saving, validation and the end of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ... import UsageError
from ...lightning_compat import logs_now


class MeasuredByCorpus(LightningModule):
    """A module that sums over validation and test batches and logs means per corpus at the end."""

    def on_validation_epoch_end(self) -> None:
        """Log the means of every corpus, and their average."""
        self._log_corpora("val", self.trainer.val_dataloaders)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compute the same metrics as in validation, logged under ``test/``."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the means of every corpus, and their average."""
        self._log_corpora("test", self.trainer.test_dataloaders)

    def _log_corpora(self, stage: str, loaders: Any) -> None:
        raise NotImplementedError


class WatchedModule(LightningModule):
    """A module with automatic optimization that logs and checks its losses and gradient norms.

    It logs ``train/loss`` (mean over the global batch) and ``train/grad_norm`` (before clipping). Subclasses pass their
    losses to :meth:`record`, and call ``super()`` in hooks of the same name.

    Args:
        max_grad_norm: Norm to clip gradients to, or None for no clipping; ``Trainer(gradient_clip_val)`` overrides it.

    Raises:
        UsageError: The norm is not above 0.
    """

    def __init__(self, max_grad_norm: float | None = 1.0) -> None:
        super().__init__()
        check_max_grad_norm(max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self._window: list[Tensor] = []
        self._window_batches: list[Any] = []
        self._latest: dict[str, Tensor] = {}
        self._recorded = FiniteWatch()

    def setup(self, stage: str) -> None:
        """Discard values from an earlier run."""
        self._recorded.forget()

    def record(self, loss: Tensor, batch: Any) -> Tensor:
        """Return a micro-batch's loss after recording it and the positions of its samples."""
        self._window.append(loss.detach())
        self._window_batches.append(place_of(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Record the loss of the global batch, and at the logging interval check and log it.

        The hook at the end of the batch would be too late, because callbacks save checkpoints before it runs.
        """
        if self._window:
            losses = torch.stack(self._window)
            self._recorded.add("loss", self.trainer.global_step, losses, self._window_batches)
            self._latest = {"train/loss": losses}
            if self._logging or self._recorded.full:
                self.check_finite()
            if self._logging:
                self.log_latest()
        self._window, self._window_batches = [], []

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients by the Trainer's setting or ``max_grad_norm``, and record and log the norm."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        limit = self.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        norm = nn.utils.clip_grad_norm_(self.parameters(), limit or float("inf"))  # 0 means no clipping in Lightning
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not scales_losses(self.trainer):
            self._recorded.add("gradient norm", self.trainer.global_step, norm)
            if self._logging:
                self.check_finite()
        self._latest["train/grad_norm"] = norm
        if self._logging:
            self.log("train/grad_norm", norm, batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the last step of a run that a callback stops, as Lightning then logs regardless of the interval."""
        if self.trainer.should_stop:
            self.log_latest()

    def on_validation_start(self) -> None:
        """Check the values so far, as a validation waits for the device anyway."""
        self.check_finite()

    def on_train_end(self) -> None:
        """Check the steps since the last logging interval."""
        self.check_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that all steps were finite before a checkpoint is saved.

        Raises:
            FloatingPointError: A step since the last check was not finite; the previous checkpoint stays the last.
        """
        self.check_finite()

    def log_latest(self) -> None:
        """Log the latest loss and norm."""
        losses, norm = self._latest.get("train/loss"), self._latest.get("train/grad_norm")
        if losses is not None:
            loss = self.trainer.strategy.reduce(losses.mean(), reduce_op="mean")
            assert isinstance(loss, Tensor)
            # Lightning reads the progress bar's values at every batch, even old ones, so keep them on the host.
            self.log("train/loss", loss.cpu(), prog_bar=True, batch_size=1)
        if norm is not None:
            self.log("train/grad_norm", norm, batch_size=1)

    def check_finite(self) -> None:
        """Raise a ``FloatingPointError`` if a value recorded since the last check is not finite."""
        check_recorded(self._recorded, self._trainer)

    @property
    def _logging(self) -> bool:
        return logs_now(self.trainer)


def check_recorded(recorded: FiniteWatch, trainer: Trainer | None) -> None:
    """Check the recorded values; if one is not finite, the data module locates its samples."""
    if not recorded.empty:
        recorded.check(getattr(getattr(trainer, "datamodule", None), "locate", None))


def place_of(batch: Any) -> dict[str, Any] | None:
    """Return the entries of a batch that locate its samples: those that stayed on the host."""
    if not isinstance(batch, dict):
        return None
    return {key: part for key, part in batch.items() if not isinstance(part, Tensor)}


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Check that a norm is above 0."""
    if max_grad_norm is not None and max_grad_norm <= 0:
        raise UsageError(f"max_grad_norm {max_grad_norm} must be above 0, or null for no clipping")


def scales_losses(trainer: Trainer) -> bool:
    """Return whether a loss scaler is used, which handles overflow by skipping the step and scaling less."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


MOST = 1000  # largest number of steps recorded without a check


class FiniteWatch:
    """Losses and norms of the steps since the last check, kept on the device.

    Checking whether a tensor is finite makes the host wait for the device, and the device then waits for the host's
    next kernels. So values stay on the device until they are read together in one copy.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, int, Tensor, Sequence[Any]]] = []

    def add(self, what: str, step: int, values: Tensor, batches: Sequence[Any] = ()) -> None:
        """Record the values of a step.

        Args:
            what: Name of the values in the message.
            step: Optimizer step of the values.
            values: Detached tensor of any shape.
            batches: Entries of each value's batch that locate its samples.
        """
        self._kept.append((what, step, values.detach().flatten(), batches))

    @property
    def empty(self) -> bool:
        """Whether no values are recorded."""
        return not self._kept

    @property
    def full(self) -> bool:
        """Whether so many values are recorded that a check is due."""
        return len(self._kept) >= MOST

    def forget(self) -> None:
        """Discard the recorded values."""
        self._kept = []

    def check(self, locate: Callable[[Any], str] | None = None) -> None:
        """Check all recorded values, and discard them if they are finite.

        Args:
            locate: Function that describes the position of the rows of one of the ``batches``.

        Raises:
            FloatingPointError: A value is not finite. The message names the first one, its step, and its rows if they
                are known. The values stay recorded, so that a later save is refused too.
        """
        if not self._kept:
            return
        values = iter(torch.cat([values for _, _, values, _ in self._kept]).cpu().tolist())
        for what, step, kept, batches in self._kept:
            for number, value in enumerate(next(values) for _ in range(len(kept))):
                if not math.isfinite(value):
                    known = locate is not None and number < len(batches) and batches[number] is not None
                    where = f" at {locate(batches[number])}" if locate is not None and known else ""
                    raise FloatingPointError(f"{what} is {value} at optimizer step {step}{where}")
        self.forget()
