"""Count the memory that fake tensors would take: tensors made by operations, and optimizer states."""

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
    """Dispatch mode that counts the memory of tensors made by operations, for as long as they are referenced.

    Attributes:
        now: Bytes that are alive.
        gradients: Bytes of them marked by :meth:`mark_gradient`.
        read: Storages that operations read while ``recording``.
        recording: Whether to record ``read``.
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
        """Run an operation and count the tensors it makes."""
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
        """Count a parameter's gradient under ``gradients`` until it is freed."""
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
    """Make fake tensors, with shapes but no memory; yield the count of the memory they would take."""
    copies = patch.object(FakeTensor, "__deepcopy__", _copy, create=True)
    with copies, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        yield live


def _copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Copy a fake tensor, which torch's deepcopy cannot do; used to copy layers and average weights."""
    copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return memo[id(tensor)]  # type: ignore[no-any-return]


def optimizer_bytes(optimizer: Optimizer, live: LiveBytes) -> tuple[dict[Tensor, int], int]:
    """Return the bytes of each parameter's states and the temporary bytes of a step, under ``without_memory``.

    Raises:
        UsageError: The optimizer cannot step on fake tensors, and is not one of rewurst's.
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
        except Exception as error:  # any error of a foreign optimizer
            raise UsageError(
                f"the states of {type(optimizer).__name__} cannot be predicted ({str(error).splitlines()[0]}): plan "
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
