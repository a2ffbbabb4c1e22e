"""What a training step holds in memory, found by running it on tensors without any.

Forward and backward run as they are, recomputation, chunks and masks included; operations only say what shape comes
out, and every tensor's memory is counted from where it appears to where it is let go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .. import UsageError
from ..modules.optimizers.eight_bit import EightBitOptimizer


@dataclass(frozen=True)
class StepBytes:
    """What a forward and backward pass hold beside weights and, but for the last two, gradients; in bytes.

    Attributes:
        forward: The most at any time of the forward pass.
        kept: At its end.
        backward: The most at any time of the backward pass.
        with_gradients: The most of that and of gradients, where there were none before.
        gradients: Those of ``with_gradients``.
    """

    forward: int
    kept: int
    backward: int
    with_gradients: int
    gradients: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of tensors that operations make, for as long as anything refers to it.

    Attributes:
        now: Bytes at this time.
        note: Called whenever there are more.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.note: Callable[[], None] = lambda: None
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes in what it has made."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._take_in(value)
        return result

    def _take_in(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:  # else a view, or an operation in place
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._let_go, key)
            self.note()

    def _let_go(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def without_memory() -> Iterator[LiveBytes]:
    """Tensors made within have shapes and no memory; yields the count of what they would take."""
    with FakeTensorMode(), LiveBytes() as live:
        yield live


def simulate(live: LiveBytes, module: nn.Module, loss_of: Callable[[], Tensor], autocast: bool) -> StepBytes:
    """Runs one forward and backward pass, under :func:`without_memory`.

    Args:
        live: What counts.
        module: Whose parameters get gradients; built under ``live`` as well.
        loss_of: The forward pass.
        autocast: Whether products are in bfloat16. The CPU's rules stand for every device's.
    """
    fixed, gradients = live.now, 0
    most = {"forward": 0, "backward": 0, "with_gradients": 0, "gradients": 0}
    going = "forward"

    def note() -> None:
        beside = live.now - fixed
        most[going] = max(most[going], beside - gradients)
        if going == "backward" and beside > most["with_gradients"]:
            most["with_gradients"], most["gradients"] = beside, gradients

    def take_gradient(parameter: Tensor) -> None:
        nonlocal gradients
        assert parameter.grad is not None
        gradients += parameter.grad.nbytes

    trained: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(take_gradient) for parameter in trained]
    live.note = note
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of()
    kept, going = live.now - fixed, "backward"
    note()
    loss.backward()  # type: ignore[no-untyped-call]
    live.note = lambda: None
    for hook in hooks:
        hook.remove()
    module.zero_grad()
    return StepBytes(kept=kept, **most)


def state_bytes(optimizer: Optimizer) -> dict[Tensor, int]:
    """Bytes of each parameter's states, under :func:`without_memory`.

    Raises:
        UsageError: The optimizer cannot step on tensors without memory, and is none of ours.
    """
    if isinstance(optimizer, EightBitOptimizer):
        optimizer.allocate()
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer.step()
        except Exception as error:  # whatever a foreign optimizer meets
            raise UsageError(
                f"the states of {type(optimizer).__name__} cannot be foreseen ({str(error).splitlines()[0]}): plan "
                "with adamw, adamw_8bit, lion, lion_8bit, muon or one of torch.optim"
            ) from error
        optimizer.zero_grad()
    return {
        parameter: sum(value.nbytes for value in state.values() if isinstance(value, Tensor) and value.ndim)
        for parameter, state in optimizer.state.items()
    }
