"""Weights that one process makes and all the others take over, shard by shard."""

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
    """Builds modules for real in the first process and without memory in all others.

    Every process of a node would otherwise hold the whole model at once: 8 times 38 GB for 9.6B parameters. What the
    first one has built, drawn or loaded, all buffers included, is handed out when :class:`~rewurst.callbacks.FSDP` has
    sharded the module, so that it is what it would have been, bit for bit. Yields whether this process is the first:
    the others cannot load weights, and need none.

    Raises:
        UsageError: Another process tried to load weights.

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
            "construct_on_rank_zero: weights are loaded while the module is built, which only the first process can: "
            "for CausalLM give `model` as settings, and what to load as init_from"
        ) from error


def whole_on_rank_zero(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """What the first process will hand out: its tensors as they are before sharding.

    Raises:
        UsageError: It has none: the weights were built on the meta device, and nobody knows their values.
    """
    whole = {name: tensor.detach() for name, tensor in tensors_of(module).items()}
    empty = [name for name, tensor in whole.items() if tensor.is_meta]
    nobody_knows = torch.tensor(int(bool(empty)), device=device)
    distributed.broadcast(nobody_knows, src=0)  # so that all processes stop, and none waits for the first one
    if nobody_knows:
        raise UsageError(
            f"{type(module).__name__} was built on the meta device by the first process too, so nobody knows the "
            f"values of {next(iter(empty), 'its parameters')}: build it under construct_on_rank_zero()"
        )
    return whole


def any_rank_is_empty(module: nn.Module, device: torch.device) -> bool:
    """Whether any process built the module without memory."""
    empty = any(tensor.is_meta for tensor in tensors_of(module).values())
    flag = torch.tensor(int(empty), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


@torch.no_grad()
def hand_out(module: nn.Module, whole: Mapping[str, Tensor], device: torch.device) -> None:
    """Fills a sharded module in every process from the first one's whole tensors.

    Args:
        module: Sharded, with memory in every process.
        whole: In the first process the values, on any device; elsewhere only their shapes matter.
        device: Where processes communicate.
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
    """Hands the first process's buffers that checkpoints hold to all others."""
    held = module.state_dict(keep_vars=True)
    for tensor in held.values():
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
            distributed.broadcast(tensor, src=0)


def refuse_empty_frozen(module: nn.Module) -> None:
    """Refuses networks beside the module tree (Stage A, a text encoder) that any process built without memory.

    Raises:
        UsageError: Names the attribute; in every process, so that none waits for another.
    """
    beside = {name: getattr(value, "module", None) for name, value in vars(module).items()}
    empty = [
        name
        for name, part in beside.items()
        if isinstance(part, nn.Module) and any(tensor.is_meta for tensor in tensors_of(part).values())
    ]
    of_all: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(of_all, empty)
    if names := [name for of_one in of_all for name in of_one]:
        raise UsageError(
            f"{names[0]} of {type(module).__name__} was built without memory and is not sharded: build this module "
            "outside of construct_on_rank_zero()"
        )
