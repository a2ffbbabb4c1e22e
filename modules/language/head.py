"""The output head and the blocks of transformers models: where the loss is computed, what is compiled or recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import UsageError


@contextmanager
def head_computes(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Temporarily replace the forward of a model's head, by one that computes the loss for example.

    The model's forward runs as ever and returns in ``logits`` what the function returns. Whatever hooks gather or cast
    the head's weight (FSDP's do) have done so when the function runs.

    Args:
        head: The model's output embeddings.
        function: From hidden states (batch, length, width) to a tensor.
    """
    before = head.__dict__.get("forward")
    head.__dict__["forward"] = function
    try:
        yield
    finally:
        del head.__dict__["forward"]
        if before is not None:
            head.__dict__["forward"] = before


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a transformers model, first to last.

    Raises:
        UsageError: The model does not say which they are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise UsageError(
            f"{type(model).__name__} does not say which its blocks are: leave compile and activation_checkpointing out"
        )
    return found


def checkpoint_activations(model: nn.Module, every: int) -> None:
    """Has every n-th block keep its input alone, and compute what is between anew in the backward pass.

    Args:
        model: A transformers model.
        every: 1 for every block, 2 for every second, beginning with the first.

    Raises:
        UsageError: The model cannot, or ``every`` is below 1.
    """
    if every < 1:
        raise UsageError(f"activation_checkpointing {every} must be at least 1, or null")
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [block for block in blocks(model) if isinstance(block, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(f"activation_checkpointing {every}: {type(model).__name__} cannot recompute its blocks")
    for layer in layers[::every]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]


def set_attention(model: Any, implementation: str) -> None:
    """Chooses how attention is computed.

    Raises:
        UsageError: The model or this installation cannot.
    """
    try:
        model.set_attn_implementation(implementation)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"attn_implementation {implementation!r} cannot be used here: {reason}") from error
    if model.config._attn_implementation != implementation:
        raise UsageError(f"attn_implementation {implementation!r}: {type(model).__name__} has no choice of attention")
