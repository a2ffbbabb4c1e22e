"""The output head and the blocks of transformers models: where the loss is computed, what is compiled or recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import UsageError


@contextmanager
def head_computes(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Has a model's head compute something else of the last hidden states, such as the loss.

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


def is_plain_head(model: nn.Module) -> bool:
    """Whether a model's logits are what its head, an ordinary linear layer, makes of hidden states, and no more.

    Found by running two tokens: models that cap or scale their logits (Gemma 2, Cohere, Granite) return another
    tensor than their head does. Random state and modes stay as they are.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    returned: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: returned.append(output))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(input_ids=ids, use_cache=False).logits
    except (RuntimeError, NotImplementedError):  # of a model without weights yet, whose forward asks for values
        return False
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training
    return len(returned) == 1 and logits is returned[0]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformers model, first to last.

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
