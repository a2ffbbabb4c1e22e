"""Which parts of a module are sharded together, and in what precision, recomputed or compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from ... import UsageError
from ...hints import closest

DType = Literal["float32", "bfloat16", "float16"]


def find_blocks(module: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """The blocks of a module, inner ones before those that hold them, as ``fully_shard`` wants them.

    Args:
        module: Any module.
        names: Class names of its blocks. By default those that the module, or any module in it, lists in
            ``_no_split_modules`` (transformers' models and our networks do); where none does, the modules that stand
            at least twice in one ``ModuleList``, such as the layers of ``nn.TransformerEncoder``, or else in one
            ``Sequential``.

    Raises:
        UsageError: A name matches nothing, or there is nothing that repeats.
    """
    there = Counter(type(part).__name__ for part in module.modules())
    for name in names or ():
        if name not in there:
            repeated = [f"{kind} ({count})" for kind, count in there.most_common() if count > 1]
            raise UsageError(
                f"blocks {name!r} matches nothing in {type(module).__name__}{closest(name, there)}; what repeats in it "
                f"is {', '.join(repeated[:8]) or 'nothing'}"
            )
    wanted = set(names or ()) or _listed(module)
    found = [part for part in module.modules() if type(part).__name__ in wanted]
    found = found or _repeated(module, nn.ModuleList) or _outermost(_repeated(module, nn.Sequential))
    found = [block for block in found if any(True for _ in block.parameters())]
    if not found:
        raise UsageError(
            f"{type(module).__name__} does not say which its blocks are and holds no list or sequence of alike "
            "modules: name their classes, FSDP(blocks=[...])"
        )
    return found[::-1]  # `modules` walks from the outside inwards


def _listed(module: nn.Module) -> set[str]:
    """Class names in any ``_no_split_modules``, of classes that are there."""
    lists: Iterable[Any] = (getattr(part, "_no_split_modules", None) or () for part in module.modules())
    return {name for names in lists for name in names}


def _repeated(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Return entries that stand at least twice, by class, in one container, and have parameters."""
    found = []
    for container in module.modules():
        if isinstance(container, kind):
            entries = [entry for entry in container.children() if any(True for _ in entry.parameters())]
            counts = Counter(type(entry) for entry in entries)
            found += [entry for entry in entries if counts[type(entry)] > 1]
    return found


def _outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    """Leave out what is within another block: a block's own layers often stand in a ``Sequential`` too."""
    inner = {part for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if block not in inner]


def frozen_children(module: nn.Module) -> list[nn.Module]:
    """Direct children that train nothing, such as an encoder beside the network that learns."""
    return [
        child
        for child in module.children()
        if (parameters := list(child.parameters())) and not any(parameter.requires_grad for parameter in parameters)
    ]


def mixed_precision(plugin: Precision, param_dtype: DType | None, reduce_dtype: DType) -> MixedPrecisionPolicy:
    """What blocks are gathered, computed and reduced in.

    Inputs are not cast under autocast, which does it itself: targets must not lose precision.

    Raises:
        UsageError: The precision needs a loss scaler.
    """
    autocast = isinstance(plugin, MixedPrecision)
    if autocast:
        if plugin.precision != "bf16-mixed":
            raise UsageError(f"FSDP: precision {plugin.precision} needs a loss scaler; use bf16-mixed")
        param_dtype = param_dtype or "bfloat16"
    return MixedPrecisionPolicy(
        None if param_dtype is None else getattr(torch, param_dtype),
        getattr(torch, reduce_dtype),
        cast_forward_inputs=param_dtype is not None and not autocast,
    )


def recompute(blocks: Sequence[nn.Module], every: int) -> None:
    """Has every n-th block keep its inputs alone and compute the rest anew in the backward pass.

    Hooks, FSDP's too, stay outside: they run once, around the block, and its parameters are there in the backward pass.
    """
    for block in blocks[::every]:
        _replace_forward(block, _recomputed)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compiles each block's own computation; hooks stay outside and run as they are."""
    for block in blocks:
        _replace_forward(block, torch.compile)


def _replace_forward(block: nn.Module, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    block.__dict__["forward"] = change(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

    return run


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those that checkpoints leave out too; shared ones under their first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
