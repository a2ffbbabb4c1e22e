"""Run a module's own training step on tensors that have shapes and no memory, and record what it would hold.

Lightning's Trainer does the step: forward, backward, and whatever hooks the module has. Operations only say what shape
comes out, and a tensor's memory is counted from the operation that makes it until nothing refers to it.
"""

from __future__ import annotations

import gc
import logging
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .. import UsageError
from ..modules.optimizers.eight_bit import EightBitOptimizer
from ..modules.shared.frozen import Frozen

LIBRARIES = tuple(str(Path(str(library.__file__)).parent) for library in (torch, lightning))


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a forward and backward pass hold besides weights, optimizer states and what was there before.

    Attributes:
        forward: Peak of the forward pass.
        kept: What is left at its end.
        backward: Peak of the backward pass, without gradients.
        with_gradients: Peak of the backward pass with gradients, if there were none before it.
        gradients: Gradients within ``with_gradients``.
        largest: The largest tensor that the step makes.
        beside: Buffers, and frozen networks that the step reads: what it needs that is not a parameter.
    """

    forward: int
    kept: int
    backward: int
    with_gradients: int
    gradients: int
    largest: int = 0
    beside: int = 0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the memory of the tensors that operations make, for as long as anything refers to them.

    Attributes:
        now: Bytes that are alive.
        gradients: Bytes among them that :meth:`mark_gradient` was called for.
        read: Storages that operations have read since this was last cleared.
        on_growth: Function to call with the size of each new tensor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.gradients = 0
        self.read: set[int] = set()
        self.on_growth: Callable[[int], None] = lambda size: None
        self._sizes: dict[int, int] = {}
        self._gradients: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        result = func(*args, **(kwargs or {}))
        self.read.update(value.untyped_storage()._cdata for value in tree_iter(args) if isinstance(value, Tensor))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def sizes(self) -> dict[int, int]:
        """Return the bytes of every live storage by its address."""
        return dict(self._sizes)

    def mark_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as such until it is freed."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self._sizes and key not in self._gradients:
            self._gradients.add(key)
            self.gradients += self._sizes[key]

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:  # otherwise a view, or an operation in place
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key)
            self.on_growth(storage.nbytes())

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.now -= size
        self.read.discard(key)
        if key in self._gradients:
            self._gradients.remove(key)
            self.gradients -= size


@contextmanager
def without_memory() -> Iterator[LiveBytes]:
    """Make tensors with shapes and no memory; yield the count of what they would take."""
    copies = patch.object(FakeTensor, "__deepcopy__", _copy, create=True)
    with copies, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        yield live


def _copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Copy a tensor without memory, which torch's own deepcopy cannot; layers and averages of weights are made so."""
    copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return memo[id(tensor)]  # type: ignore[no-any-return]


class _StepMeasured(Exception):  # noqa: N818  # not an error
    """Raised to end a run after the step that was measured."""


class _StepRecorder(Callback):
    """Record the peaks of one training step, without the optimizers' own, then end the run."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.before = live, live.now
        self.optimizers: list[Optimizer] = []
        self.peaks = {"forward": 0, "backward": 0, "with_gradients": 0, "gradients": 0, "largest": 0, "kept": 0}
        self._phase = "forward"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record."""
        self.optimizers = list(trainer.optimizers)
        for optimizer in self.optimizers:
            optimizer.__dict__["step"] = _only_closure
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.live.mark_gradient)  # type: ignore[no-untyped-call]
        self.live.read.clear()
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
        self.live.on_growth = lambda size: None
        raise _StepMeasured

    def _record(self, size: int) -> None:
        held, peaks = self.live.now - self.before, self.peaks
        peaks["largest"] = max(peaks["largest"], size)
        peaks[self._phase] = max(peaks[self._phase], held - self.live.gradients)
        if self._phase == "backward" and held > peaks["with_gradients"]:
            peaks["with_gradients"], peaks["gradients"] = held, self.live.gradients


def _only_closure(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
    """Stand in for an optimizer's step, which is measured by itself."""
    return None if closure is None else closure()


class _OnFakeTensors(SingleDeviceStrategy):
    """One device, to which nothing is moved: tensors without memory cannot be."""

    def model_to_device(self) -> None:
        """Leave the module as it is."""

    def teardown(self) -> None:
        """Leave the module as it is."""


class _OneBatch(LightningDataModule):
    """A data module with the attributes of the real one, and one batch."""

    def __init__(self, data: LightningDataModule, batch: Any) -> None:
        super().__init__()
        self.__dict__.update(vars(data))
        self.batch = batch

    def train_dataloader(self) -> Any:
        """Return the batch in an iterable: a DataLoader would draw a seed, which has no value here."""
        return iter([self.batch])


def measure_step(
    live: LiveBytes, module: LightningModule, data: LightningDataModule, batch: Any, precision: str
) -> tuple[StepBytes, list[Optimizer]]:
    """Run a module's training step once, under :func:`without_memory`; return its bytes and the module's optimizers.

    Args:
        live: Count under which the module was built as well.
        module: Module to train, with automatic or manual optimization.
        data: Data module whose attributes the module may look at.
        batch: Batch as ``training_step`` gets it, with tensors of any values.
        precision: The Trainer's; the CPU's rules for mixed precision stand for every device's.

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
    except Exception as error:  # whatever the step of a module meets
        raise UsageError(_reason(error, type(module).__name__)) from error
    for optimizer in recorder.optimizers:
        del optimizer.__dict__["step"]
    module.zero_grad()
    beside = sum(there[key] for key in _beside(module, live.read) if key in there)
    return StepBytes(**recorder.peaks, beside=beside), recorder.optimizers


def _beside(module: LightningModule, read: set[int]) -> set[int]:
    """Return the storages on a module's device besides parameters: those read, and frozen networks as a whole."""
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
        precision=precision,  # type: ignore[arg-type]  # checked by whoever read the config
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
    """Keep the Trainer from talking of a run that is none."""
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
    """Say in one line why a step could not be run, and where."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(LIBRARIES)]
    place = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if f.filename != __file__), "unknown place")
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return (
            f"the training step of {name} needs the values of tensors ({error.func}, {place}), which are not known "
            "before training: leave that out while planning, or compute it without values"
        )
    text = (str(error).splitlines() or [""])[0]
    return f"the training step of {name} failed on the example batch: {type(error).__name__}: {text} ({place})"


def optimizer_bytes(optimizer: Optimizer, live: LiveBytes) -> tuple[dict[Tensor, int], int]:
    """Return the bytes of each parameter's states, and of what a step holds for a moment, under ``without_memory``.

    Raises:
        UsageError: The optimizer cannot step on tensors without memory, and is not one of ours.
    """
    held = [live.now]
    if isinstance(optimizer, EightBitOptimizer):
        optimizer.allocate()
    else:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer.step()  # makes the states
            held = [live.now]
            live.on_growth = lambda size: held.append(live.now)
            optimizer.step()
        except Exception as error:  # whatever a foreign optimizer meets
            raise UsageError(
                f"the states of {type(optimizer).__name__} cannot be foreseen ({str(error).splitlines()[0]}): plan "
                "with adamw, adamw_8bit, lion, lion_8bit, muon or one of torch.optim"
            ) from error
        finally:
            live.on_growth = lambda size: None
        optimizer.zero_grad()
    states = {
        parameter: sum(value.nbytes for value in state.values() if isinstance(value, Tensor) and value.ndim)
        for parameter, state in optimizer.state.items()
    }
    return states, max(held) - held[0]
