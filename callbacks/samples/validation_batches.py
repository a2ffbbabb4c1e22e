"""What callbacks ask of a validation: its corpora, how far training is, and parts of its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor


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
