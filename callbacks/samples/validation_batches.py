"""Helpers for callbacks in validation: its corpora, the progress of training, and parts of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ... import UsageError
from ...checkpoints.newest import describe
from ...lightning_compat import batches_that_stepped
from ..learning_rate.lengths import counted_optimizers


class ValidationCallback(Callback):
    """A callback that knows in validation how many global batches the weights have been trained on."""

    def completed_steps(self, trainer: Trainer) -> int:
        """Return the number of completed global batches; Lightning restores a checkpoint's only in fit."""
        path, module = trainer.ckpt_path, trainer.lightning_module
        if trainer.state.fn == TrainerFn.FITTING or path is None:
            counted = int(trainer.global_step) // counted_optimizers(module, len(trainer.optimizers))
            return counted or batches_that_stepped(trainer)  # Lightning does not count manual optimizer steps
        content = (describe(Path(path)) if Path(path).exists() else None) or {}
        optimizers = len(content.get("optimizer_states", []))
        return int(content.get("global_step", 0)) // counted_optimizers(module, optimizers)


def corpora(trainer: Trainer) -> list[str]:
    """Return the names of the validation corpora: the loaders' keys, or their numbers."""
    loaders = trainer.val_dataloaders
    if isinstance(loaders, Mapping):
        return list(loaders)
    return [str(index) for index in range(len(loaders))] if isinstance(loaders, (list, tuple)) else ["0"]


def samples_of(batch: Any, module: Any, who: str) -> Any:
    """Return a batch that can be divided, or the result of the module's ``batch_fields`` for it.

    Raises:
        UsageError: The batch has no tensor to count its samples by, and the module has no ``batch_fields``.
    """
    if _counted(batch) is not None:
        return batch
    hook = getattr(module, "batch_fields", None)
    fields = hook(batch) if callable(hook) else None
    if _counted(fields) is not None:
        return fields
    raise UsageError(
        f"{who}: a validation batch is a {type(batch).__name__}, but must be a tensor, or a dict, list or tuple with "
        f"tensors: give {type(module).__name__} a method batch_fields(batch) that returns such a dict"
    )


def fields_of(batch: Any, module: Any) -> dict[str, Any]:
    """Return the fields of a batch by name: ``image``, ``caption``, ``valid``."""
    hook = getattr(module, "batch_fields", None)
    if callable(hook) and not isinstance(batch, Mapping):
        return dict(hook(batch))
    return dict(batch) if isinstance(batch, Mapping) else {}


def length(batch: Any) -> int:
    """Return the number of samples: the first dimension of the first tensor."""
    counted = _counted(batch)
    assert counted is not None
    return counted


def select(batch: Any, samples: Sequence[int]) -> Any:
    """Return some samples of a batch in its structure; entries that are not per sample stay unchanged."""
    return _selected(batch, length(batch), list(samples))


def valid(fields: Mapping[str, Any], count: int) -> list[int]:
    """Return the samples that are not padding."""
    counted = fields.get("valid")
    return [i for i in range(count) if counted is None or bool(counted[i])]


def _counted(batch: Any) -> int | None:
    if isinstance(batch, (Tensor, np.ndarray)):
        return len(batch) if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((count for part in parts if (count := _counted(part)) is not None), None)


def _selected(part: Any, whole: int, samples: list[int]) -> Any:
    if isinstance(part, (Tensor, np.ndarray)):
        return part[samples] if part.ndim and len(part) == whole else part
    if isinstance(part, Mapping):
        return {name: _selected(value, whole, samples) for name, value in part.items()}
    if not isinstance(part, (list, tuple)):
        return part
    if _counted(part) is None:  # texts, numbers
        return [part[i] for i in samples] if len(part) == whole else part
    chosen = [_selected(value, whole, samples) for value in part]
    return type(part)(*chosen) if hasattr(part, "_fields") else type(part)(chosen)
