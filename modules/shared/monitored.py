"""Training whose loss and gradient norm are logged by global batch and stop the run when they are not finite.

Nothing of it makes the host wait for the device between logging intervals: values are kept where they are and looked at
together, at the logging interval and before anything is saved, validated or ended.
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
    """A module whose validation and test batches add to sums, which are logged per corpus at the end."""

    def on_validation_epoch_end(self) -> None:
        """Log the means of every corpus, and their average."""
        self._log_corpora("val", self.trainer.val_dataloaders)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure as in validation; metrics are logged under ``test/``."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the means of every corpus, and their average."""
        self._log_corpora("test", self.trainer.test_dataloaders)

    def _log_corpora(self, stage: str, loaders: Any) -> None:
        raise NotImplementedError


class WatchedModule(LightningModule):
    """A module with automatic optimization that watches what it trains on.

    Logs ``train/loss`` (mean over the global batch) and ``train/grad_norm`` (before clipping). Subclasses hand their
    losses to :meth:`watch`, and call ``super()`` where they have hooks of the same name.

    Args:
        max_grad_norm: Norm that gradients are clipped to, none for no clipping. ``Trainer(gradient_clip_val)`` wins.

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
        self._watch = FiniteWatch()

    def setup(self, stage: str) -> None:
        """Forgets what an earlier run kept."""
        self._watch.forget()

    def watch(self, loss: Tensor, batch: Any) -> Tensor:
        """Returns a micro-batch's loss after taking note of it and of where its samples lie."""
        self._window.append(loss.detach())
        self._window_batches.append(place_of(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Takes in the loss of the whole global batch, and at the logging interval looks at it and logs it.

        Here and not at the end of the batch: callbacks save checkpoints before the module's own hook runs there.
        """
        if self._window:
            losses = torch.stack(self._window)
            self._watch.add("loss", self.trainer.global_step, losses, self._window_batches)
            self._latest = {"train/loss": losses}
            if self._logging or self._watch.full:
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
        """Clips by the Trainer's setting or ``max_grad_norm``, and watches and logs the norm."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        limit = self.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        norm = nn.utils.clip_grad_norm_(self.parameters(), limit or float("inf"))  # Lightning's 0 is no clipping
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not scales_losses(self.trainer):
            self._watch.add("gradient norm", self.trainer.global_step, norm)
            if self._logging:
                self.check_finite()
        self._latest["train/grad_norm"] = norm
        if self._logging:
            self.log("train/grad_norm", norm, batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the last step of a run that a callback stops: Lightning logs then, whatever the interval."""
        if self.trainer.should_stop:
            self.log_latest()

    def on_validation_start(self) -> None:
        """A validation waits for the device anyway."""
        self.check_finite()

    def on_train_end(self) -> None:
        """Looks at the steps since the last logging interval."""
        self.check_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lets nothing be saved after a step that was not finite.

        Raises:
            FloatingPointError: There was one since the last look; the checkpoint before stays the last.
        """
        self.check_finite()

    def log_latest(self) -> None:
        """Logs the latest loss and norm."""
        losses, norm = self._latest.get("train/loss"), self._latest.get("train/grad_norm")
        if losses is not None:
            loss = self.trainer.strategy.reduce(losses.mean(), reduce_op="mean")
            assert isinstance(loss, Tensor)
            # Lightning reads what is on the progress bar at every batch, also what is old: let that lie on the host.
            self.log("train/loss", loss.cpu(), prog_bar=True, batch_size=1)
        if norm is not None:
            self.log("train/grad_norm", norm, batch_size=1)

    def check_finite(self) -> None:
        """Raises a ``FloatingPointError`` where a value kept since the last look is not finite."""
        look(self._watch, self._trainer)

    @property
    def _logging(self) -> bool:
        return logs_now(self.trainer)


def look(watch: FiniteWatch, trainer: Trainer | None) -> None:
    """Reads what a watch keeps; where a value is not finite, the data module says where its samples lie."""
    if not watch.empty:
        watch.check(getattr(getattr(trainer, "datamodule", None), "locate", None))


def place_of(batch: Any) -> dict[str, Any] | None:
    """What of a batch says where its samples lie: what stayed on the host."""
    if not isinstance(batch, dict):
        return None
    return {key: part for key, part in batch.items() if not isinstance(part, Tensor)}


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Refuses a norm that is not above 0."""
    if max_grad_norm is not None and max_grad_norm <= 0:
        raise UsageError(f"max_grad_norm {max_grad_norm} must be above 0, or null for no clipping")


def scales_losses(trainer: Trainer) -> bool:
    """Whether a norm that overflows is no accident: a loss scaler leaves that step out and scales less."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


MOST = 1000  # steps that are kept before they are looked at, where nothing else asks for it


class FiniteWatch:
    """Losses and norms of the steps since they were last looked at, left on the device.

    Asking a tensor whether it is finite makes the host wait until the device has come to it, and the device then waits
    for the host's next kernels. So values are kept as they are, and read together in one copy.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, int, Tensor, Sequence[Any]]] = []

    def add(self, what: str, step: int, values: Tensor, batches: Sequence[Any] = ()) -> None:
        """Keeps values of a step.

        Args:
            what: What they are, for the message.
            step: The optimizer step that they belong to.
            values: Any shape; detached.
            batches: Of each value, what its place in the data can be told from.
        """
        self._kept.append((what, step, values.detach().flatten(), batches))

    @property
    def empty(self) -> bool:
        """Whether nothing is kept."""
        return not self._kept

    @property
    def full(self) -> bool:
        """Whether so many are kept that it is time to look."""
        return len(self._kept) >= MOST

    def forget(self) -> None:
        """Drops what is kept."""
        self._kept = []

    def check(self, locate: Callable[[Any], str] | None = None) -> None:
        """Reads all that is kept, and drops it where everything is finite.

        Args:
            locate: From one of the ``batches`` to words that say where its rows lie.

        Raises:
            FloatingPointError: The first value that is not finite, its step, and its rows where they are known. What
                is kept stays, so that a later save is refused too.
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
