"""What callbacks ask of a validation: its corpora, how far training is, and parts of its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ...checkpoints.newest import describe
from ..learning_rate.lengths import counted_optimizers


class ValidationCallback(Callback):
    """A callback that knows at a validation how many global batches the weights have been trained on."""

    def completed_steps(self, trainer: Trainer) -> int:
        """Return the number of completed global batches; Lightning restores that of a checkpoint in fit only."""
        path, module = trainer.ckpt_path, trainer.lightning_module  # type: ignore[attr-defined]
        if trainer.state.fn == TrainerFn.FITTING or path is None:
            return int(trainer.global_step) // counted_optimizers(module, len(trainer.optimizers))
        content = (describe(Path(path)) if Path(path).exists() else None) or {}
        optimizers = len(content.get("optimizer_states", []))
        return int(content.get("global_step", 0)) // counted_optimizers(module, optimizers)


def corpora(trainer: Trainer) -> list[str]:
    """Names of the validation corpora: the loaders' keys, or their numbers."""
    loaders = trainer.val_dataloaders
    if isinstance(loaders, Mapping):
        return list(loaders)
    return [str(index) for index in range(len(loaders))] if isinstance(loaders, (list, tuple)) else ["0"]


def length(batch: Mapping[str, Any]) -> int:
    """Samples of a batch: the first dimension of its tensors."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def select(batch: Mapping[str, Any], samples: Sequence[int]) -> dict[str, Any]:
    """Some samples of a batch; what does not belong to samples is left out."""
    whole, chosen = length(batch), list(samples)
    return {
        name: [value[i] for i in chosen] if isinstance(value, list) else value[chosen]
        for name, value in batch.items()
        if isinstance(value, (list, Tensor, np.ndarray)) and len(value) == whole
    }


def valid(batch: Mapping[str, Any]) -> list[int]:
    """Samples that do not only fill a batch up."""
    counted = batch.get("valid")
    return [i for i in range(length(batch)) if counted is None or bool(counted[i])]
