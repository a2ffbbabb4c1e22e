"""Count what tensors without memory would take: of operations as they come, and of optimizers' states."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .. import UsageError
from ..modules.optimizers.eight_bit import EightBitOptimizer


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the memory of the tensors that operations make, for as long as anything refers to them.

    Attributes:
        now: Bytes that are alive.
        gradients: Bytes among them that :meth:`mark_gradient` was called for.
        read: Storages that operations read while ``recording``.
        recording: Whether to keep track of them.
        on_growth: Function to call with the size of each new tensor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.gradients = 0
        self.read: set[int] = set()
        self.recording = False
        self.on_growth: Callable[[int], None] = lambda size: None
        self._sizes: dict[int, int] = {}
        self._gradients: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        result = func(*args, **(kwargs or {}))
        if self.recording:
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
