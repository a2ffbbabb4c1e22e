"""Notice when a global batch is complete, however a module steps its optimizers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class StepCallback(Callback):
    """A callback that knows whether any optimizer stepped since it last asked.

    Lightning's ``on_before_optimizer_step`` is not called where a module steps an optimizer of its own
    (``self.optimizers(use_pl_optimizer=False)``), so the optimizers themselves tell. Subclasses that override one of
    these hooks call it on their base class too.
    """

    _stepped = False
    _ever_stepped = False
    _handles: tuple[Any, ...] = ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the optimizers."""
        self._stop_listening()
        self._stepped = self._ever_stepped = False
        optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
        self._handles = tuple(optimizer.register_step_post_hook(self._step_done) for optimizer in optimizers)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count the step, also if a loss scaler skips it."""
        self._stepped = self._ever_stepped = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        self._stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening after an error."""
        self._stop_listening()

    def take_stepped(self) -> bool:
        """Return whether an optimizer stepped since the last call."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": ()}

    def _step_done(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = self._ever_stepped = True

    def _stop_listening(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()
