"""Ask a model, by running a few tokens, whether it is causal and whether it keeps documents apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ... import UsageError
from .configs import first_line
from .document_masks import document_arguments, require_positions

BEFORE, AFTER = 5, 8  # tokens of the two documents of the probe: longer than the convolutions of hybrid models


def require_causal(model: nn.Module) -> None:
    """Refuse a model in which a token sees those after it, such as an encoder that is not set to be a decoder.

    Raises:
        UsageError: It would learn to copy instead of to predict, or it cannot be run.
    """
    if not _has_weights(model):
        return
    before, after = _lengths(model)
    ids = _tokens(model, before + after)
    try:
        leaks = _leaks(model, ids, {}, seen=slice(0, before), unseen=slice(before, None))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{type(model).__name__} cannot read {before + after} tokens: {first_line(error)}") from error
    if leaks:
        raise UsageError(
            f"{type(model).__name__}: its tokens see the tokens after them, so it would learn to copy, not to predict; "
            "set is_decoder: true if its config has that, or take a causal language model"
        )


def require_separate_documents(model: nn.Module) -> None:
    """Refuse ``document_masks`` for a model whose documents see one another anyway.

    Two documents are run in one row: no loss of the second may depend on the first, and each must be what it is when
    the second document is run alone. States of recurrent layers cross documents, whatever the attention does.

    Raises:
        UsageError: The model cannot keep documents apart.
    """
    require_positions(model)
    if not _has_weights(model):
        return
    before, after = _lengths(model)
    ids = _tokens(model, before + 1 + after)
    arguments = document_arguments(model, ids, int(ids[0, before]))
    first, second = slice(0, before), slice(before + 1, None)
    try:
        apart = not _leaks(model, ids, arguments, seen=second, unseen=first) and _equal_alone(
            model, ids, arguments, second
        )
    except (RuntimeError, ValueError, TypeError, IndexError):
        apart = False
    if not apart:
        kind = getattr(model.config, "_attn_implementation", None)
        raise UsageError(
            f"document_masks: {type(model).__name__} with {kind} attention does not keep the documents of a row apart; "
            "leave document_masks out"
        )


def _leaks(model: Any, ids: Tensor, arguments: dict[str, Any], seen: slice, unseen: slice) -> bool:
    """Return whether logits at the positions ``seen`` depend on the tokens at ``unseen``.

    The gradient is exactly zero if they do not, in any precision, so that the smallest leak shows. What changes
    only by a choice, such as that of an expert, shows when the tokens are replaced by others.
    """
    with _as_evaluated(model), torch.enable_grad(), _embeddings_of(model) as captured:
        logits = model(input_ids=ids, use_cache=False, **arguments).logits
        (gradient,) = torch.autograd.grad(logits[:, seen].float().logsumexp(-1).sum(), captured[0], allow_unused=True)
    if gradient is not None and not bool((gradient[:, unseen] == 0).all()):
        return True
    others = ids.clone()
    others[:, unseen] = ids[:, unseen].flip(1)
    with _as_evaluated(model), torch.no_grad():
        changed = model(input_ids=others, use_cache=False, **arguments).logits
    return not _close(changed[:, seen], logits[:, seen])


def _equal_alone(model: Any, ids: Tensor, arguments: dict[str, Any], second: slice) -> bool:
    with _as_evaluated(model), torch.no_grad():
        together = model(input_ids=ids, use_cache=False, **arguments).logits[:, second]
        alone = model(input_ids=ids[:, second], use_cache=False).logits
    return _close(together, alone)


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-3 if torch.finfo(a.dtype).bits >= 32 else 0.1
    return bool((F.log_softmax(a.float(), -1) - F.log_softmax(b.float(), -1)).abs().max() < tolerance)


def _lengths(model: Any) -> tuple[int, int]:
    """Return the lengths of the two documents, which a model of few positions can read with a token between them."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = positions if isinstance(positions, int) and positions > 2 else BEFORE + 1 + AFTER
    before = min(BEFORE, max(1, (room - 1) // 3))
    return before, min(AFTER, room - 1 - before)


def _tokens(model: Any, count: int) -> Tensor:
    """Return different tokens (1, count), none of them padding."""
    weight = model.get_input_embeddings().weight
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    usable = [token for token in range(min(len(weight), 2 * count + 2)) if token != pad]
    return torch.tensor([[usable[(i + 1) % len(usable)] for i in range(count)]], device=weight.device)


def _has_weights(model: nn.Module) -> bool:
    return not any(
        parameter.device.type == "meta" or isinstance(parameter, FakeTensor) for parameter in model.parameters()
    )


@contextmanager
def _embeddings_of(model: Any) -> Iterator[list[Tensor]]:
    """Collect what the embeddings return, as tensors that gradients can be asked for, even if weights are frozen."""
    captured: list[Tensor] = []

    def capture(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1].clone()  # some models scale it in place

    hook: Callable[[], None] = model.get_input_embeddings().register_forward_hook(capture).remove
    try:
        yield captured
    finally:
        hook()


@contextmanager
def _as_evaluated(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and leave modes and the random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes:
            module.training = training
