"""Random states of every rank in the checkpoint, so that a killed run resumes as if nothing had happened."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed

from .. import UsageError
from ..lightning_compat import before_first_batch
from .optimizer_steps import StepCallback

Randomness = dict[str, Any]


class ExactResume(StepCallback):
    """Saves and restores the random states of Python, NumPy, PyTorch and the device, of every rank.

    Lightning saves none: a resumed run draws other dropout masks than the one that was never stopped. Validation is
    kept from touching them too, since a run that was stopped between a save and a validation leaves that one out.

    What this cannot restore is the position of a loader, without which no run resumes exactly: ``TextDataModule`` and
    the other data modules have it, and so does torchdata's ``StatefulDataLoader``.
    Saving is a collective operation where there are several processes, as saving a checkpoint is. A checkpoint saved
    within a global batch (``ModelCheckpoint`` saves after the first micro-batch of a resumed run) contains the states
    from before it, since a run that resumes from there repeats that global batch.

    Raises:
        UsageError: The checkpoint is of another number of processes. Set ``world_size_may_change`` where nothing in
            training draws from these states, or where an exact continuation is not wanted.

    Args:
        world_size_may_change: With another number of processes keep the states there are, and warn, instead of
            refusing.
    """

    def __init__(self, world_size_may_change: bool = False) -> None:
        self.world_size_may_change = world_size_may_change
        self._restored: list[Randomness] | None = None
        self._after_batch: Randomness | None = None
        self._after_step: Randomness | None = None
        self._within_step = False

    def state_dict(self) -> dict[str, Any]:
        """Return the states by rank: tensors, numbers and tuples, nothing that would need unpickling."""
        within = self._within_step and not self._stepped
        own = self._after_step if within and self._after_step is not None else randomness()
        if not (distributed.is_available() and distributed.is_initialized()):
            return {"ranks": [own]}
        ranks: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until training starts: set-up and the sanity check draw from them."""
        state = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn != TrainerFn.FITTING or state is None:
            return
        ranks = state["ranks"]
        if len(ranks) == trainer.world_size:
            self._restored = ranks
        elif self.world_size_may_change:
            rank_zero_warn(f"random states of {len(ranks)} processes are not used by {trainer.world_size}")
        else:
            raise UsageError(
                f"the checkpoint holds random states of {len(ranks)} processes and this run has {trainer.world_size}: "
                "use as many, or ExactResume(world_size_may_change=True)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the restored states in place."""
        super().on_train_start(trainer, pl_module)
        if self._restored is not None:
            states, self._restored = self._restored[trainer.global_rank], None
            restore_randomness(states)
            before_first_batch(trainer, partial(restore_randomness, states))
        self._after_batch = self._after_step = randomness()
        self._within_step = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note whether a global batch begins or continues."""
        self._within_step = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Remembers the states before any validation."""
        self._after_batch = randomness()
        if self.take_stepped():  # the global batch is complete with this micro-batch
            self._after_step, self._within_step = self._after_batch, False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undoes what validation drew."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._after_batch is not None:
            restore_randomness(self._after_batch)


def randomness() -> Randomness:
    """Return the random states of this process, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: Randomness = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()  # a process trains on its current device
    return states


def restore_randomness(states: Randomness) -> None:
    """Restore states of :func:`randomness`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
