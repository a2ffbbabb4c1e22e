"""An exponential moving average of what a module trains, for validation, samples and the weights that are kept."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from .. import UsageError
from ..lightning_compat import on_weights_only_save
from .averaging import State, averaged, copied, holds, put
from .learning_rate.lengths import counted_optimizers
from .optimizer_steps import StepCallback


class WeightAverage(StepCallback, WeightAveraging):
    """Averages trainable parameters and buffers: a copy until ``start_step``, then a moving average.

    The average takes the weights' place in validation (and so in ``LogSamples``), at the end of training, and in
    checkpoints, whose ``state_dict`` is the average, also in those that contain only weights; the weights being trained
    are stored next to it under ``current_model_state``, as Lightning's own averaging keeps them, and a resumed run
    continues with both, bit for bit. Until the average has been updated once the weights stay in their place. Of
    several averages the first in the Trainer's list does this; the others are only kept, and stored in checkpoints.
    Floating-point buffers (BatchNorm's statistics) are averaged too, counters copied. Weights below float32 are
    averaged in float32. Parameters that are frozen when training starts are left alone and take no second copy; that of
    one that is unfrozen later begins then.

    A step is one completed global batch, also with several optimizers and with accumulation. Needs nothing of the
    module. Moves itself to the front of the trainer's callbacks, so that a checkpoint which another one saves at the
    end of a batch holds that batch.

    Args:
        decay: Share of the average that an update keeps.
        every: Steps from one update to the next.
        start_step: Step up to which the average is a copy; a run that ends before ends on its weights.
        device: Where the average is kept, such as ``"cpu"``; by default that of the weights.

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
            raise UsageError(f"WeightAverage: decay {decay} must be in [0, 1)")
        if every < 1 or start_step < 0:
            raise UsageError(
                f"WeightAverage: every {every} must be at least 1 and start_step {start_step} at least 0, both in steps"
            )
        self.decay, self.every, self.start_step = decay, every, start_step
        self.step = 0
        self.average: State = {}
        self._current: State = {}
        self._ended: State = {}
        self._updated = False
        self._restored = False
        self._leads = True

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, so that there may be several averages."""
        return self._generate_state_key(decay=self.decay, every=self.every, start_step=self.start_step)

    @property
    def _legacy_state_key(self) -> Any:
        return "WeightAverage"  # the key in checkpoints of before there could be several

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin with a copy of the weights, and move to the front of the callbacks."""
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        averages = [callback for callback in callbacks if isinstance(callback, WeightAverage)]
        trainer.callbacks = [*averages, *(c for c in callbacks if c not in averages)]  # type: ignore[attr-defined]
        self._leads = averages[0] is self
        if self._leads:
            on_weights_only_save(trainer, lambda checkpoint: self._replace(trainer.lightning_module, checkpoint))
        self._current = {}
        self._restored = bool(self._ended) and holds(self.average, pl_module)  # a fit after another continues
        if self._restored:
            return
        self.average, self._ended, self._updated = {}, {}, False
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._copy(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a copy of the shards, if the strategy has sharded the module by now and loads after this."""
        if trainer.strategy.restore_checkpoint_after_setup and not self._restored:
            self._copy(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the step if no checkpoint of this callback did, and drop what has been frozen by now."""
        super().on_train_start(trainer, pl_module)
        put(self._ended, pl_module)
        self._ended = {}
        if not self._restored:
            names = dict(averaged(pl_module))
            self.average = {name: tensor for name, tensor in self.average.items() if name in names}
            self.step = trainer.global_step // counted_optimizers(pl_module, len(trainer.optimizers))
            self._copy(pl_module)  # the strategy may have loaded the weights after set-up

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after a completed global batch."""
        if not self.take_stepped():
            return
        self.step += 1
        if self.step <= self.start_step:
            self._copy(pl_module)
            self._updated = True
        elif self.step % self.every == 0:
            self._update(pl_module)
            self._updated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No-op; averaging is per step."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the weights' place."""
        if trainer.state.fn == TrainerFn.FITTING and self._leads and self._updated:
            self._current = {name: tensor.detach().clone() for name, tensor in averaged(pl_module)}
            put(self.average, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        if self._current:
            put(self._current, pl_module)
            self._current = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module with its average, and keep the weights for checkpoints that are still to be saved."""
        super().on_train_end(trainer, pl_module)
        if not self._ever_stepped and not self._updated:
            rank_zero_warn("WeightAverage: no optimizer step was seen, so nothing was averaged and the weights stay")
        if self._leads and self._updated:
            self._ended = {name: tensor.detach().clone() for name, tensor in averaged(pl_module)}
            put(self.average, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and whether the average has been updated."""
        return {"step": self.step, "updated": self._updated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step over."""
        self.step, self._updated = state_dict["step"], self._restored and state_dict.get("updated", True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average in ``state_dict`` and the weights next to it."""
        weights: State = checkpoint["state_dict"]
        own = {name: weights[name] for name in self.average if name in weights}
        if not self._leads:
            checkpoint[self.state_key] = {name: self.average[name] for name in own}
            return
        if not own or (self._ended and not holds(self.average, pl_module)):
            return  # never trained, or given other weights after training
        raw = self._current or self._ended
        checkpoint["current_model_state"] = {name: raw.get(name, tensor) for name, tensor in own.items()}
        kept = [name for name in own if not self._updated or self.average[name].dtype != own[name].dtype]
        checkpoint["averaging_state"] = {name: self.average[name] for name in kept}
        self._replace(pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take average and weights from where ``on_save_checkpoint`` put them, before training only."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "current_model_state" not in checkpoint or (not self._leads and self.state_key not in checkpoint):
            rank_zero_info("WeightAverage: the checkpoint holds no average, which begins with its weights")
            return
        self._adopt_state(trainer, checkpoint["callbacks"])
        current: State = dict(checkpoint["current_model_state"])
        kept = checkpoint["state_dict"] | checkpoint.get("averaging_state", {})
        kept = kept if self._leads else checkpoint[self.state_key]
        self._require(pl_module, kept)
        names = {name: tensor for name, tensor in kept.items() if name in current or name in self.average}
        for name, tensor in names.items():
            if name in self.average:
                self.average[name].copy_(tensor)
            else:  # of a parameter that was unfrozen later
                self.average[name] = copied(tensor, self._device)
        if self._leads:
            put(current, pl_module)
        self._ended, self._restored = {}, True

    def _adopt_state(self, trainer: Trainer, states: dict[str, Any]) -> None:
        """Take the step from the only other average there was, if its settings have been changed since."""
        claimed = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        others = [key for key in states if str(key).startswith("WeightAverage{") and key not in claimed]
        if self.state_key not in states and "WeightAverage" not in states and len(others) == 1:
            states[self.state_key] = states[others[0]]

    def _replace(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average in ``state_dict``, unless it was never updated or the module has other weights by now."""
        if not self._updated or (self._ended and not holds(self.average, module)):
            return
        weights: State = checkpoint["state_dict"]
        own = {name: tensor for name, tensor in self.average.items() if name in weights}
        checkpoint["state_dict"] = weights | {name: tensor.to(weights[name].dtype) for name, tensor in own.items()}

    def _require(self, module: LightningModule, kept: State) -> None:
        """Refuse the average of another model; parts that a checkpoint may lack begin with their weights."""
        for name, tensor in self.average.items():
            if name not in kept and not module.strict_loading:
                continue
            if name not in kept or kept[name].shape != tensor.shape:
                raise UsageError(
                    f"WeightAverage: the checkpoint's average has no {name} of shape {tuple(tensor.shape)}"
                )

    @torch.no_grad()
    def _copy(self, module: LightningModule) -> None:
        for name, tensor in averaged(module):
            kept = self.average.get(name)
            if kept is None or kept.shape != tensor.shape:
                self.average[name] = copied(tensor, self._device)
            else:
                self._beside(name, tensor).copy_(tensor)

    @torch.no_grad()
    def _update(self, module: LightningModule) -> None:
        for name, tensor in averaged(module):
            if name not in self.average:  # unfrozen since training started
                self.average[name] = copied(tensor, self._device)
                continue
            average = self._beside(name, tensor)
            if tensor.is_floating_point():
                average.lerp_(tensor.to(average), 1 - self.decay)
            else:
                average.copy_(tensor)

    def _beside(self, name: str, tensor: Tensor) -> Tensor:
        """Return the average of one tensor, on its device: set-up comes before the strategy moves the module."""
        if self._device is None and self.average[name].device != tensor.device:
            self.average[name] = self.average[name].to(tensor.device)
        return self.average[name]
