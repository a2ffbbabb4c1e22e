"""Run a module's real training step on fake tensors, and record the memory it would hold.

Lightning's Trainer runs the step: forward, backward and the module's hooks. The optimizers' own steps are left out;
:func:`.counting.optimizer_bytes` measures them.
"""

from __future__ import annotations

import gc
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from .. import UsageError
from ..modules.shared.frozen import Frozen
from .arithmetic import StepBytes
from .counting import LiveBytes

NOT_THE_MODULE = tuple(str(Path(str(file)).parent) for file in (torch.__file__, lightning.__file__, __file__))
"""Folders whose code is never reported as the cause of a failed step."""


class _StepMeasured(Exception):  # noqa: N818  # not an error
    """Raised to end a run after the measured step."""


class _StepRecorder(Callback):
    """Callback that records the peaks of one training step, without optimizer steps, and then ends the run."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.before = live, live.now
        self.optimizers: list[Optimizer] = []
        self.peaks = {"forward": 0, "backward": 0, "with_gradients": 0, "gradients": 0, "largest": 0, "kept": 0}
        self._phase = "forward"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start recording."""
        self.optimizers = list(trainer.optimizers)
        for optimizer in self.optimizers:
            optimizer.__dict__["step"] = _only_closure
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.live.mark_gradient)  # type: ignore[no-untyped-call]
        self.live.recording = True
        self.live.on_growth = self._record

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Enter the backward pass."""
        self.peaks["kept"] = max(self.peaks["kept"], self.live.now - self.before - self.live.gradients)
        self._phase = "backward"
        self._record(0)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the backward pass; a module that optimizes manually may compute a second loss."""
        self._phase = "forward"

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop recording."""
        self.live.recording = False
        self.live.on_growth = lambda size: None
        raise _StepMeasured

    def _record(self, size: int) -> None:
        held, peaks = self.live.now - self.before, self.peaks
        peaks["largest"] = max(peaks["largest"], size)
        peaks[self._phase] = max(peaks[self._phase], held - self.live.gradients)
        if self._phase == "backward" and held > peaks["with_gradients"]:
            peaks["with_gradients"], peaks["gradients"] = held, self.live.gradients


def _only_closure(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
    """Replace an optimizer's step, which is measured separately."""
    return None if closure is None else closure()


class _OnFakeTensors(SingleDeviceStrategy):
    """Single-device strategy that moves nothing, because fake tensors cannot be moved."""

    def model_to_device(self) -> None:
        """Leave the module as it is."""

    def teardown(self) -> None:
        """Leave the module as it is."""


class _OneBatch(LightningDataModule):
    """Data module with the attributes of the real one and a single batch."""

    def __init__(self, data: LightningDataModule, batch: Any) -> None:
        super().__init__()
        self.__dict__.update(vars(data))
        self._example = batch

    def train_dataloader(self) -> Any:
        """Return the batch in an iterable; a DataLoader would draw a seed, which has no value here."""
        return iter([self._example])


def measure_step(
    live: LiveBytes, module: LightningModule, data: LightningDataModule, batch: Any, precision: str
) -> tuple[StepBytes, list[Optimizer]]:
    """Run a module's training step once under :func:`.counting.without_memory`; return its bytes and the optimizers.

    Args:
        live: Count under which the module was built.
        module: Module to train, with automatic or manual optimization.
        data: Data module whose attributes the module may read.
        batch: Batch as ``training_step`` gets it, with tensors of any values.
        precision: Precision of the Trainer; the CPU's rules for mixed precision are used for every device.

    Raises:
        UsageError: The step needs the values of tensors, or fails.
    """
    gc.collect()
    recorder, there = _StepRecorder(live), live.sizes()
    batch = tree_map_only(Tensor, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype), batch)
    try:
        with _quiet_lightning():
            _trainer(precision, recorder).fit(module, datamodule=_OneBatch(data, batch))
    except _StepMeasured:
        pass
    except UsageError:
        raise
    except Exception as error:  # any error of the module's step
        raise UsageError(_reason(error, type(module).__name__)) from error
    for optimizer in recorder.optimizers:
        del optimizer.__dict__["step"]
    module.zero_grad()
    extra = sum(there[key] for key in _extra(module, live.read) if key in there)
    return StepBytes(**recorder.peaks, extra=extra), recorder.optimizers


def _extra(module: LightningModule, read: set[int]) -> set[int]:
    """Return the storages on a module's device besides parameters: those read, and whole frozen networks."""
    frozen = [{*_storages(part.module)} for part in vars(module).values() if isinstance(part, Frozen)]
    used = read.union(*(storages for storages in frozen if storages & read))
    buffers = {buffer.untyped_storage()._cdata for buffer in module.buffers()}
    return buffers | used - {parameter.untyped_storage()._cdata for parameter in module.parameters()}


def _storages(network: nn.Module) -> Iterator[int]:
    yield from (tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers()))


def _trainer(precision: str, recorder: Callback) -> Trainer:
    return Trainer(
        strategy=_OnFakeTensors(device="cpu"),
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]  # already checked
        callbacks=[recorder],
        max_steps=1,
        log_every_n_steps=0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence the Trainer's messages about this run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception, name: str) -> str:
    """Return one line with the reason and the place at which a step failed."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    places = (f"{frame.filename}:{frame.lineno}" for frame in frames if not frame.filename.startswith(NOT_THE_MODULE))
    place = next(places, "unknown place")
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return (
            f"the training step of {name} needs the values of tensors ({error.func}, {place}), which are unknown "
            "before training: skip this while planning, or compute it without values"
        )
    text = (str(error).splitlines() or [""])[0]
    return f"the training step of {name} failed on the example batch: {type(error).__name__}: {text} ({place})"
