"""Losses over a vocabulary that never hold the logits of all tokens in memory.

In a small language model the head is the largest matrix product, and its logits are the largest tensor: 0.8 GB in fp32
for 4,096 tokens and 50,304 entries. A plain cross-entropy holds three of these (logits, log-probabilities, gradient).
Here each chunk of tokens goes from hidden states to its part of both gradients before the next chunk starts, and all
chunks share a buffer. Nothing is computed twice: the gradient of a sum is known in the forward pass, up to the factor
from backward (as in Liger Kernel, Hsu et al. 2024, section 3.2).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import UsageError

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Settings(NamedTuple):
    """Settings that all chunks share."""

    ignore_index: int
    z_loss: float
    chunk: int
    summed: bool
    wanted: tuple[bool, bool, bool]
    dtype: torch.dtype


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross-entropy of ``hidden @ weight.T + bias`` against targets, in nats, computed chunk by chunk.

    Products are computed in the inputs' precision (or autocast's, if enabled), everything else and the sums of
    gradients in float32 (float64 for float64 inputs). ``"mean"`` and ``"sum"`` compute gradients in the forward pass
    and keep a tensor of the size of ``hidden`` and one of the size of ``weight``; ``"none"`` recomputes its logits in
    backward. Second derivatives are not supported.

    A DTensor weight is gathered, and its gradient is assumed to be the same on every rank of its mesh, as in tensor
    parallelism. Under FSDP, call this inside the head's ``forward``, as :class:`CausalLM` does: there FSDP has gathered
    the weight, and it averages the gradient afterwards.

    Args:
        hidden: Last hidden states, (..., width).
        weight: Weight of the head, or the tied embedding, (vocabulary, width).
        targets: Token ids, (...).
        bias: Bias of the head, (vocabulary,).
        ignore_index: Value of targets that have no loss and no gradient, and do not count in the mean.
        z_loss: Factor of the ``log(Z)**2`` that is added to every loss (Chowdhery et al. 2022, section 5, use 1e-4).
        reduction: ``"mean"`` over targets that count (0 if there are none), ``"sum"``, or ``"none"``, (...).
        chunk_tokens: Number of tokens per chunk (default: :func:`chunk_size`).

    Raises:
        UsageError: Sizes do not match, or the reduction or the chunk size is invalid.
    """
    _check(hidden, weight, targets, reduction, chunk_tokens)
    weight, bias = _gathered(weight), None if bias is None else _gathered(bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    settings = _Settings(
        ignore_index,
        z_loss,
        chunk_tokens or chunk_size(*weight.shape),
        reduction != "none",
        (wanted[0], wanted[1], wanted[2]),
        _product_dtype(hidden),
    )
    result: Tensor = _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, bias, targets.flatten(), settings)
    if reduction == "none":
        return result.view(targets.shape)
    if reduction == "sum":
        return result
    return result / (targets != ignore_index).sum().clamp(min=1)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, z_loss: float = 0.0, reduction: Literal["none", "mean"] = "mean"
) -> Tensor:
    """Return the same loss from given logits, for heads that are more than a matrix product.

    Args:
        logits: Logits, (..., vocabulary).
        targets: Token ids, (...); -100 for tokens without a loss.
        z_loss: Factor of the z-loss, as in :func:`linear_cross_entropy`.
        reduction: Reduction, as in :func:`linear_cross_entropy`.
    """
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    counted = targets != -100
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square() * counted
    return losses if reduction == "none" else losses.sum() / counted.sum().clamp(min=1)


def chunk_size(vocabulary: int, width: int) -> int:
    """Return the number of tokens per chunk: the model's width, but at least 512.

    With as many tokens as the model's width, a chunk's logits are as large as the weight's gradient, which is needed
    anyway, and adding to that gradient costs a fraction of 1 / width of the products. With fewer than 512 rows the
    products do not reach the processor's full speed. The buffer stays below 2 GiB in fp32 for any vocabulary.
    """
    return max(1, min(max(512, width), 2**29 // vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum or list of losses, with their gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        """Compute the losses chunk by chunk, and the gradients too if the losses are summed."""
        ctx.settings = settings
        if settings.summed:
            losses, gradients = _over_chunks(hidden, weight, bias, targets, settings, None)
            ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
            ctx.save_for_backward(*gradients)
            return losses.sum()
        ctx.save_for_backward(hidden, weight, bias, targets)
        return _over_chunks(hidden, weight, bias, targets, settings._replace(wanted=(False,) * 3), None)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients from the forward pass, or compute them now with a factor per token."""
        if ctx.settings.summed:
            ready = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            scaled = [None if gradient is None else (gradient * factor).to(dtype) for gradient, dtype in ready]
            return (*scaled, None, None)
        hidden, weight, bias, targets = ctx.saved_tensors
        gradients = _over_chunks(hidden, weight, bias, targets, ctx.settings, factor)[1]
        pairs = zip(gradients, (hidden, weight, bias), strict=True)
        return (*(None if gradient is None else gradient.to(x.dtype) for gradient, x in pairs), None, None)


def _over_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    settings: _Settings,
    factors: Tensor | None,
) -> tuple[Tensor, Gradients]:
    """Return the losses (tokens,) and the gradients of their sum, each token's multiplied by its factor."""
    exact = torch.float64 if settings.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight = hidden.to(settings.dtype), weight.to(settings.dtype)
        losses = hidden.new_empty(len(hidden), dtype=exact)
        of_hidden = torch.empty_like(hidden) if settings.wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=exact) if settings.wanted[1] else None
        of_bias = hidden.new_zeros(len(weight), dtype=exact) if settings.wanted[2] else None
        buffer = hidden.new_empty(min(settings.chunk, len(hidden)), len(weight))
        for begin in range(0, len(hidden), settings.chunk):
            rows = slice(begin, begin + settings.chunk)
            part = hidden[rows]
            logits = torch.mm(part, weight.t(), out=buffer[: len(part)]).to(exact)
            if bias is not None:
                logits += bias
            factor = None if factors is None else factors[rows]
            losses[rows] = _losses_(logits, targets[rows], settings, factor)
            gradient = logits.to(settings.dtype)
            if of_hidden is not None:
                torch.mm(gradient, weight, out=of_hidden[rows])
            if of_weight is not None:
                _add_product_(of_weight, gradient.t(), part)
            if of_bias is not None:
                of_bias += logits.sum(0)
    return losses, (of_hidden, of_weight, of_bias)


def _losses_(logits: Tensor, targets: Tensor, settings: _Settings, factor: Tensor | None) -> Tensor:
    """Return losses (tokens,), overwriting logits with their gradient if one is wanted, else with scratch values."""
    ignored = targets == settings.ignore_index
    index = targets.masked_fill(ignored, 0)[:, None]
    highest = logits.amax(1, keepdim=True)
    below = highest - logits.gather(1, index)
    total = logits.sub_(highest).exp_().sum(1, keepdim=True)
    log_z = total.log()
    losses = below + log_z
    log_z = log_z + highest
    if settings.z_loss:
        losses = losses + settings.z_loss * log_z.square()
    if any(settings.wanted):
        counts = ~ignored[:, None] if factor is None else factor[:, None].masked_fill(ignored[:, None], 0)
        counts = counts.to(logits.dtype)
        logits.mul_((1 + 2 * settings.z_loss * log_z) / total * counts)
        logits.scatter_add_(1, index, -counts)
    return losses.squeeze(1).masked_fill(ignored, 0)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product to a sum that may have higher precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the data type that a linear layer would compute in here."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _gathered(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full, and a plain one unchanged."""
    full = getattr(tensor, "full_tensor", None)  # avoids importing torch.distributed
    return tensor if full is None else full()


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, chunk_tokens: int | None) -> None:
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        raise UsageError(
            f"hidden states {tuple(hidden.shape)}, head {tuple(weight.shape)} and targets {tuple(targets.shape)} do "
            "not match: expected (..., width), (vocabulary, width) and (...)"
        )
    if reduction not in ("none", "mean", "sum"):
        raise UsageError(f'reduction {reduction!r} must be "none", "mean" or "sum"')
    if chunk_tokens is not None and chunk_tokens < 1:
        raise UsageError(f"chunk_tokens {chunk_tokens} must be at least 1")
