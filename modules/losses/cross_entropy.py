"""Losses over a vocabulary, without ever holding the logits of all tokens.

The head of a language model is the largest matrix product of a small model, and its logits the largest tensor: 4,096
tokens over 50,304 entries are 0.8 GB in fp32, of which a plain cross-entropy holds three (logits, log-probabilities,
gradient). Here a chunk of tokens goes all the way from hidden states to its part of both gradients before the next one
begins, in one buffer. Nothing is computed twice: the gradient of a sum is known in the forward pass, up to the factor
that backward brings (as in Liger Kernel, Hsu et al. 2024, section 3.2).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import UsageError

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Settings(NamedTuple):
    """What is the same for every chunk."""

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
    """Cross-entropy of ``hidden @ weight.T + bias`` against targets, in nats, chunk by chunk.

    Products are taken in the inputs' precision (autocast's, where it is on), everything else and the sums of gradients
    in float32, or in float64 for such inputs. ``"mean"`` and ``"sum"`` compute gradients in the forward pass and keep
    one tensor the size of ``hidden`` and one the size of ``weight``; ``"none"`` computes its logits again in backward.
    Gradients of gradients do not exist.

    A weight that is a DTensor is gathered, and its gradient taken to be the same on every rank of its mesh, as it is
    under tensor parallelism. Under FSDP call this inside the head's ``forward``, as :class:`CausalLM` does: FSDP has
    gathered the weight there, and averages its gradient afterwards.

    Args:
        hidden: Last hidden states, (..., width).
        weight: The head, or the tied embedding, (vocabulary, width).
        targets: Entries of the vocabulary, (...).
        bias: The head's, (vocabulary,).
        ignore_index: Targets with this value have no loss and no gradient, and do not count in the mean.
        z_loss: Factor of ``log(Z)**2`` which is added to every loss (Chowdhery et al. 2022, section 5, take 1e-4).
        reduction: ``"mean"`` over targets that count (0 where there are none), ``"sum"``, or ``"none"``, (...).
        chunk_tokens: Tokens in a chunk; by default :func:`chunk_size`.

    Raises:
        UsageError: Sizes that do not belong together, a reduction or chunk that does not exist.
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
    """The same loss where the logits are there: for heads that do more than multiply.

    Args:
        logits: (..., vocabulary).
        targets: (...), -100 where nothing is to be predicted.
        z_loss: As in :func:`linear_cross_entropy`.
        reduction: As in :func:`linear_cross_entropy`.
    """
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    counted = targets != -100
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square() * counted
    return losses if reduction == "none" else losses.sum() / counted.sum().clamp(min=1)


def chunk_size(vocabulary: int, width: int) -> int:
    """Tokens in a chunk: as many as the model is wide, and 512 or more.

    With as many as the model is wide, the logits of a chunk are as large as the weight's gradient, which has to be
    there anyway, and adding to that gradient costs a share of 1 / width of the products. Below 512 rows the products
    become slower than the processor can be. The buffer stays under 2 GiB of fp32 for any vocabulary.
    """
    return max(1, min(max(512, width), 2**29 // vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum or list of losses, and their gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        """One pass over the chunks; a sum leaves with its gradients ready."""
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
        """Scales what the forward pass found, or computes it now with a factor for every token."""
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
    """Losses (tokens,) and the gradients of their sum, each token's times its factor."""
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
    """Losses (tokens,); logits become their gradient in place where one is wanted, else something of no use."""
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
    """Adds a product to a sum that may be of higher precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would compute in here."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; a plain one as it is."""
    full = getattr(tensor, "full_tensor", None)  # asked this way, a DTensor needs no import of torch.distributed
    return tensor if full is None else full()


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, chunk_tokens: int | None) -> None:
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        raise UsageError(
            f"hidden states {tuple(hidden.shape)}, head {tuple(weight.shape)} and targets {tuple(targets.shape)} do "
            "not belong together: expected (..., width), (vocabulary, width) and (...)"
        )
    if reduction not in ("none", "mean", "sum"):
        raise UsageError(f'reduction {reduction!r} must be "none", "mean" or "sum"')
    if chunk_tokens is not None and chunk_tokens < 1:
        raise UsageError(f"chunk_tokens {chunk_tokens} must be at least 1")
