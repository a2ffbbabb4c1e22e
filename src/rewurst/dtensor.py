"""The parts of whole tensors that processes hold."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(tensor: Tensor, whole: Tensor | None = None) -> Tensor:
    """Return this process's part of a tensor, or of another one that is sharded alike."""
    if not isinstance(tensor, DTensor):
        return tensor if whole is None else whole
    if whole is None:
        return tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]


def like_parameter(parameter: Tensor | None, value: Tensor, fill: bool = False) -> Tensor:
    """Room for a value, sharded as the parameter that it goes with; whole where it has another shape than that.

    Args:
        parameter: The parameter, if there is one.
        value: Its shape and type count; on the meta device, or with values.
        fill: Whether the values are copied.
    """
    if not isinstance(parameter, DTensor) or parameter.shape != value.shape or value.ndim == 0:
        device = "cpu" if parameter is None or parameter.shape != value.shape else parameter.device
        result = torch.empty(value.shape, dtype=value.dtype, device=device)
        return result.copy_(value) if fill else result
    shard: Tensor = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    if fill:
        local_part(shard).copy_(local_part(shard, value))
    return shard
