"""Choice of the blocks to shard, their precision, recomputation and compilation."""

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
    """Return the blocks of a module, with inner blocks before the outer ones, as ``fully_shard`` requires.

    Args:
        module: Module to search.
        names: Class names of its blocks. By default, those that it or one of its submodules lists in
            ``_no_split_modules`` (as transformers' models and our networks do); without such a list, classes that
            occur at least twice in one ``ModuleList``, such as the layers of ``nn.TransformerEncoder``, or else in
            one ``Sequential``.

    Raises:
        UsageError: A name matches nothing, or no class repeats.
    """
    there = Counter(type(part).__name__ for part in module.modules())
    for name in names or ():
        if name not in there:
            repeated = [f"{kind} ({count})" for kind, count in there.most_common() if count > 1]
            raise UsageError(
                f"blocks {name!r} matches nothing in {type(module).__name__}{closest(name, there)}; these classes "
                f"repeat in it: {', '.join(repeated[:8]) or 'none'}"
            )
    wanted = set(names or ()) or _listed(module)
    found = [part for part in module.modules() if type(part).__name__ in wanted]
    found = found or _repeated(module, nn.ModuleList) or _outermost(_repeated(module, nn.Sequential))
    found = [block for block in found if any(True for _ in block.parameters())]
    if not found:
        raise UsageError(
            f"{type(module).__name__} does not name its blocks and has no list or sequence of modules of one class: "
            "name the blocks' classes, FSDP(blocks=[...])"
        )
    return found[::-1]  # `modules` goes from the outside in


def _listed(module: nn.Module) -> set[str]:
    """Return the class names in any ``_no_split_modules`` that occur in the module."""
    lists: Iterable[Any] = (getattr(part, "_no_split_modules", None) or () for part in module.modules())
    return {name for names in lists for name in names}


def _repeated(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Return entries with parameters whose class occurs at least twice in one container."""
    found = []
    for container in module.modules():
        if isinstance(container, kind):
            entries = [entry for entry in container.children() if any(True for _ in entry.parameters())]
            counts = Counter(type(entry) for entry in entries)
            found += [entry for entry in entries if counts[type(entry)] > 1]
    return found


def _outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    """Leave out blocks within another block, because a block's own layers are often in a ``Sequential`` too."""
    inner = {part for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if block not in inner]


def frozen_children(module: nn.Module) -> list[nn.Module]:
    """Return direct children without trained parameters, such as an encoder next to the network that learns."""
    return [
        child
        for child in module.children()
        if (parameters := list(child.parameters())) and not any(parameter.requires_grad for parameter in parameters)
    ]


def mixed_precision(plugin: Precision, param_dtype: DType | None, reduce_dtype: DType) -> MixedPrecisionPolicy:
    """Return the precision that blocks are gathered, computed and reduced in.

    Inputs are not cast under autocast, which casts them itself, so that targets do not lose precision.

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
    """Let every n-th block keep only its inputs and recompute the rest in the backward pass.

    Hooks, including FSDP's, stay outside: they run once, around the block, and gather its parameters for backward.
    """
    for block in blocks[::every]:
        _replace_forward(block, _recomputed)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block's own computation; hooks stay outside and are not compiled."""
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
    """Return parameters and all buffers, even those not in checkpoints; shared ones under their first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
