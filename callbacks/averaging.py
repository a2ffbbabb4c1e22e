"""Tensors of a moving average: which ones there are, in which precision, and how they take each other's place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def averaged(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield trainable parameters, and buffers that checkpoints hold, by the names they have there."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if isinstance(tensor, Tensor):
            yield name, tensor


def wide(tensor: Tensor) -> torch.dtype:
    """Return the precision that a tensor is averaged in, at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype


def copied(tensor: Tensor, device: torch.device | int | None) -> Tensor:
    """Return a copy in the precision of averages."""
    return tensor.detach().to(device or tensor.device, wide(tensor), copy=True)


@torch.no_grad()
def put(state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Copy tensors into a module's own of the same names."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in state:
            tensor.copy_(state[name])


@torch.no_grad()
def holds(state: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Return whether a module's tensors are these, in its own precision."""
    own: dict[str, Any] = module.state_dict(keep_vars=True)
    return all(name in own and bool((own[name] == state[name].to(own[name])).all()) for name in state)
