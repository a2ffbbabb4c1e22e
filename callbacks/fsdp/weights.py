"""Weights that one process builds and distributes to all others as shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ... import UsageError
from ...lightning_compat import launched_rank
from .blocks import tensors_of


@contextmanager
def construct_on_rank_zero() -> Iterator[bool]:
    """Build modules with memory only in the first process, and on the meta device in all others.

    Otherwise every process of a node would have a whole copy of the model: 8 times 38 GB for 9.6B parameters. When
    :class:`~rewurst.callbacks.FSDP` has sharded the module, the first process distributes its weights and all buffers,
    so that the result is the same to the bit. Yields whether this process is the first; the others cannot load weights
    and do not need to.

    Raises:
        UsageError: A process other than the first tried to load weights.

    Example::

        with construct_on_rank_zero() as first:
            module = CausalLM({"model_type": "gpt_neox", ...}, init_from="folder" if first else None)
        Trainer(strategy=FSDP(), devices=8).fit(module, data)
    """
    if launched_rank() == 0:
        yield True
        return
    try:
        with torch.device("meta"):
            yield False
    except RuntimeError as error:
        if "meta device" not in str(error):
            raise
        raise UsageError(
            "construct_on_rank_zero: building the module loads weights, which only the first process can do: for "
            "CausalLM give `model` as settings, and the weights to load as init_from"
        ) from error


def whole_on_rank_zero(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors that the first process will distribute, as they are before sharding.

    Raises:
        UsageError: The first process, too, built the weights on the meta device, so their values are unknown.
    """
    whole = {name: tensor.detach() for name, tensor in tensors_of(module).items()}
    empty = [name for name, tensor in whole.items() if tensor.is_meta]
    nobody_knows = torch.tensor(int(bool(empty)), device=device)
    distributed.broadcast(nobody_knows, src=0)  # so that all processes stop and none waits for the first
    if nobody_knows:
        raise UsageError(
            f"{type(module).__name__} was built on the meta device by the first process too, so the values of "
            f"{next(iter(empty), 'its parameters')} are unknown: build it under construct_on_rank_zero()"
        )
    return whole


def any_rank_is_empty(module: nn.Module, device: torch.device) -> bool:
    """Return whether any process built the module on the meta device."""
    empty = any(tensor.is_meta for tensor in tensors_of(module).values())
    flag = torch.tensor(int(empty), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


@torch.no_grad()
def hand_out(module: nn.Module, whole: Mapping[str, Tensor], device: torch.device) -> None:
    """Fill a sharded module in every process from the first process's whole tensors.

    Args:
        module: Sharded module, with memory in every process.
        whole: Whole tensors in the first process, on any device; in other processes only their shapes matter.
        device: Device through which processes communicate.
    """
    first = distributed.get_rank() == 0
    for name, tensor in tensors_of(module).items():
        like = whole[name]
        value = like.to(device) if first else torch.empty(like.shape, dtype=like.dtype, device=device)
        if isinstance(tensor, DTensor):
            shard = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.to_local().copy_(shard.to_local())
        else:
            distributed.broadcast(value, src=0)
            tensor.copy_(value)


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Copy the first process's buffers that are in checkpoints to all others."""
    held = module.state_dict(keep_vars=True)
    for tensor in held.values():
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
            distributed.broadcast(tensor, src=0)


def refuse_empty_frozen(module: nn.Module) -> None:
    """Check that no process built frozen networks outside the module tree (Stage A, text encoders) without memory.

    Raises:
        UsageError: A process did; it is raised in every process, so that none waits for another.
    """
    outside = {name: getattr(value, "module", None) for name, value in vars(module).items()}
    empty = [
        name
        for name, part in outside.items()
        if isinstance(part, nn.Module) and any(tensor.is_meta for tensor in tensors_of(part).values())
    ]
    of_all: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(of_all, empty)
    if names := [name for of_one in of_all for name in of_one]:
        raise UsageError(
            f"{names[0]} of {type(module).__name__} was built without memory and is not sharded: build this module "
            "outside of construct_on_rank_zero()"
        )
