"""Training whose loss and gradient norm are logged by global batch and stop the run when they are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .. import UsageError


class WatchedModule(LightningModule):
    """A module with automatic optimization that watches what it trains on.

    Logs ``train/loss`` (mean over the global batch) and ``train/grad_norm`` (before clipping).

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

    def watch(self, loss: Tensor, batch: Any) -> Tensor:
        """Return a micro-batch's loss after taking note of it."""
        if not torch.isfinite(loss):
            raise FloatingPointError(not_finite(self.trainer, "loss", loss, self.trainer.global_step, batch))
        self._window.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the loss of the whole global batch."""
        if self._window:
            loss = torch.stack(self._window).mean()
            self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=1)
        self._window = []

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the Trainer's setting or ``max_grad_norm``, logs the norm, and stops when it is not finite."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        limit = self.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        norm = nn.utils.clip_grad_norm_(self.parameters(), limit or float("inf"))  # Lightning's 0 is no clipping
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm) and not scales_losses(self.trainer):
            raise FloatingPointError(not_finite(self.trainer, "gradient norm", norm, self.trainer.global_step))
        self.log("train/grad_norm", norm, batch_size=1)


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Refuse a norm that is not above 0."""
    if max_grad_norm is not None and max_grad_norm <= 0:
        raise UsageError(f"max_grad_norm {max_grad_norm} must be above 0, or null for no clipping")


def scales_losses(trainer: Trainer) -> bool:
    """Say whether a norm that overflows is no accident: a loss scaler leaves that step out and scales less."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def not_finite(trainer: Trainer, what: str, value: Tensor, step: int, batch: Any = None) -> str:
    """Return the message that names step and, where the data module knows it, the samples' place."""
    locate: Callable[[Any], str] | None = getattr(trainer.datamodule, "locate", None)  # type: ignore[attr-defined]
    where = f" at {locate(batch)}" if locate is not None and batch is not None else ""
    return f"{what} is {value.item()} at optimizer step {step}{where}"
