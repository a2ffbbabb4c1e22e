"""An exponential moving average of what a module trains, for validation, samples and the weights that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from .. import UsageError
from .learning_rate.lengths import counted_optimizers

State = dict[str, Tensor]


class WeightAverage(WeightAveraging):
    """Averages trainable parameters and buffers: a copy until ``start_step``, then a moving average.

    The average takes the weights' place in validation (and so in ``LogSamples``), at the end of training, and in
    checkpoints, whose ``state_dict`` is the average; the weights being trained lie beside it under
    ``current_model_state``, as Lightning's own averaging keeps them, and a resumed run goes on with both, bit for bit.
    Floating-point buffers (BatchNorm's statistics) are averaged too, counters copied. Weights below float32 are
    averaged in float32. Parameters that are frozen when training starts are left alone and take no second copy.

    A step is one completed global batch, also with several optimizers and with accumulation. Needs nothing of the
    module. Moves itself to the front of the trainer's callbacks, so that a checkpoint which another one saves at the
    end of a batch holds that batch.

    Args:
        decay: Share of the average that an update keeps.
        every: Steps from one update to the next.
        start_step: Step up to which the average is a copy; a run that ends before ends on its weights.
        device: Where the average is kept, such as ``"cpu"``; by default beside the weights.

    Raises:
        UsageError: A number is out of range, or a checkpoint's average is another model's.

    Example::

        Trainer(callbacks=[WeightAverage(decay=0.9, every=100, start_step=5000)])  # Stage C's, as it was released
    """

    def __init__(
        self, decay: float = 0.999, every: int = 1, start_step: int = 0, device: torch.device | str | None = None
    ) -> None:
        super().__init__(device=device)
        if not 0 <= decay < 1:
            raise UsageError(f"WeightAverage: decay {decay} must lie in [0, 1)")
        if every < 1 or start_step < 0:
            raise UsageError(
                f"WeightAverage: every {every} must be at least 1 and start_step {start_step} at least 0, both in steps"
            )
        self.decay, self.every, self.start_step = decay, every, start_step
        self.step = 0
        self.average: State = {}
        self._current: State = {}
        self._stepped = False
        self._restored = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins with a copy of the weights, and moves to the front of the callbacks."""
        if stage != "fit":
            return
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        self._current, self._stepped, self._restored = {}, False, False
        self.average = {}
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._copy(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins with a copy of the shards, where the strategy has sharded the module by now and loads after this."""
        if trainer.strategy.restore_checkpoint_after_setup:
            self._copy(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settles the step where no checkpoint of this callback did, and drops what has been frozen by now."""
        averaged = dict(_averaged(pl_module))
        self.average = {name: tensor for name, tensor in self.average.items() if name in averaged}
        if not self._restored:
            self.step = trainer.global_step // counted_optimizers(pl_module, len(trainer.optimizers))
            self._copy(pl_module)  # the strategy may have loaded the weights after set-up

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The global batch is complete with this micro-batch."""
        self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average after a completed global batch."""
        if not self._stepped:
            return
        self._stepped = False
        self.step += 1
        if self.step <= self.start_step:
            self._copy(pl_module)
        elif self.step % self.every == 0:
            self._update(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: epochs do not matter here."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the average in the weights' place."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._current = {name: tensor.detach().clone() for name, tensor in _averaged(pl_module)}
            self._put(self.average, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the weights back."""
        if self._current:
            self._put(self._current, pl_module)
            self._current = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the module with its average."""
        self._put(self.average, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the step over."""
        self.step, self._restored = state_dict["step"], True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the average in ``state_dict`` and the weights beside it."""
        if trainer.state.fn != TrainerFn.FITTING or not self.average:
            return
        weights: State = checkpoint["state_dict"]
        own = {name: weights[name] for name in self.average if name in weights}
        checkpoint["current_model_state"] = {name: self._current.get(name, tensor) for name, tensor in own.items()}
        checkpoint["averaging_state"] = {name: self.average[name] for name in own if self._is_wider(name, own[name])}
        checkpoint["state_dict"] = weights | {name: self.average[name].to(own[name].dtype) for name in own}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes average and weights from where ``on_save_checkpoint`` put them, before training only."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "current_model_state" not in checkpoint:
            rank_zero_info("WeightAverage: the checkpoint holds no average, which begins with its weights")
            return
        current = dict(checkpoint["current_model_state"])
        kept = checkpoint["state_dict"] | checkpoint.get("averaging_state", {})
        for name, tensor in self.average.items():
            if name not in kept or kept[name].shape != tensor.shape:
                raise UsageError(
                    f"WeightAverage: the checkpoint's average has no {name} of shape {tuple(tensor.shape)}"
                )
            tensor.copy_(kept[name])
        self._put(current, pl_module)
        self._restored = True

    @torch.no_grad()
    def _copy(self, module: LightningModule) -> None:
        for name, tensor in _averaged(module):
            kept = self.average.get(name)
            if kept is None or kept.shape != tensor.shape:
                self.average[name] = tensor.detach().to(self._device or tensor.device, _wide(tensor), copy=True)
            else:
                self._beside(name, tensor).copy_(tensor)

    @torch.no_grad()
    def _update(self, module: LightningModule) -> None:
        for name, tensor in _averaged(module):
            average = self._beside(name, tensor)
            if tensor.is_floating_point():
                average.lerp_(tensor.to(average), 1 - self.decay)
            else:
                average.copy_(tensor)

    def _beside(self, name: str, tensor: Tensor) -> Tensor:
        """The average of one tensor, on its device: set-up comes before the strategy moves the module."""
        if self._device is None and self.average[name].device != tensor.device:
            self.average[name] = self.average[name].to(tensor.device)
        return self.average[name]

    @torch.no_grad()
    def _put(self, state: State, module: LightningModule) -> None:
        for name, tensor in _averaged(module):
            if name in state:
                tensor.copy_(state[name])

    def _is_wider(self, name: str, tensor: Tensor) -> bool:
        return self.average[name].dtype != tensor.dtype


def _averaged(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters, and buffers that checkpoints hold, by the names they have there."""
    held = module.state_dict(keep_vars=True)
    for name, tensor in held.items():
        if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad:
            continue
        if isinstance(tensor, Tensor):
            yield name, tensor


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
