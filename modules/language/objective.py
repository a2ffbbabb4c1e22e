"""The objective of a model: the loss of its tokens, and every other term that its own code adds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..losses.cross_entropy import cross_entropy, linear_cross_entropy
from .head import head_computes

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "moe_topk")
"""Names that configs have for the number of experts of a token."""


class Objective(NamedTuple):
    """How a model's loss is computed.

    Attributes:
        plain_head: Whether its logits are what an ordinary linear layer makes of hidden states, and nothing else needs
            them, so that the logits of all tokens need not exist.
        own_terms: Whether its own loss adds terms to the tokens' losses, such as the balance of experts.
        arguments: Arguments that its forward needs to compute these terms.
    """

    plain_head: bool
    own_terms: bool
    arguments: dict[str, Any]


class Losses(NamedTuple):
    """Losses, and the logits of the routers of each layer with experts if the model gives them."""

    losses: Tensor
    router_logits: tuple[Tensor, ...] = ()


def find_objective(model: nn.Module) -> Objective:
    """Find out how a model computes its loss by running two tokens; random state and modes stay as they are."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            plain = _is_plain(model)
            arguments = _router_arguments(model)
            own_terms, needs_logits = _own_terms(model, arguments, plain)
    finally:
        for module, training in modes:
            module.training = training
    return Objective(plain and not needs_logits, own_terms, arguments if own_terms else {})


def compute_losses(
    model: Any,
    objective: Objective,
    arguments: dict[str, Any],
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    reduction: Literal["none", "mean"] = "mean",
    training: bool = False,
) -> Losses:
    """Run a model and return its tokens' losses, with its own terms if ``training``.

    Args:
        model: A causal language model of transformers.
        objective: What :func:`find_objective` found of it.
        arguments: Arguments of its forward.
        targets: Token to predict at each position, -100 for none.
        z_loss: Factor of ``log(Z)**2`` added to every loss.
        reduction: ``"mean"`` over targets that count, or ``"none"``.
        training: Whether to add the model's own terms, which needs the reduction ``"mean"``.
    """
    head = model.get_output_embeddings()

    def of_hidden(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, head.weight, targets, head.bias, z_loss=z_loss, reduction=reduction)

    def of_logits(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        return logits if objective.plain_head else cross_entropy(logits, targets, z_loss=z_loss, reduction=reduction)

    with ExitStack() as changes:
        if objective.plain_head:
            changes.enter_context(head_computes(head, of_hidden))
        if not (training and objective.own_terms):
            return Losses(of_logits(model(**arguments, use_cache=False).logits))
        changes.enter_context(_loss_function(model, of_logits))
        given = {**arguments, **objective.arguments, "labels": arguments["input_ids"]}
        output = model(**given, use_cache=False)
    logits = getattr(output, "router_logits", None) or ()
    return Losses(output.loss, tuple(each for each in logits if isinstance(each, Tensor)))


@torch.no_grad()
def busiest_share(model: Any, router_logits: tuple[Tensor, ...]) -> Tensor | None:
    """Return the share of the choices of a layer's routers that its busiest expert takes, the largest of all layers.

    With E experts it lies between 1 / E, a perfect balance, and the inverse of the number of experts of a token.
    """
    config = model.config.get_text_config()
    chosen = next((int(getattr(config, name)) for name in TOP_K if getattr(config, name, None)), 1)
    shares = []
    for logits in router_logits:
        experts = logits.shape[-1]
        picks = logits.flatten(0, -2).topk(min(chosen, experts), dim=-1).indices.flatten()
        counts = torch.zeros(experts, device=logits.device).scatter_add_(
            0, picks, torch.ones_like(picks, dtype=torch.float32)
        )
        shares.append(counts.max() / picks.numel())
    return torch.stack(shares).max() if shares else None


def _is_plain(model: Any) -> bool:
    """Return whether the logits are the output of the head, an ordinary linear layer, and no more.

    Models that cap or scale their logits (Gemma 2, Cohere, Granite) return another tensor than their head does.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    returned: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: returned.append(output))
    try:
        logits = model(input_ids=_two_tokens(model), use_cache=False).logits
    except (RuntimeError, NotImplementedError):  # of a model without weights yet, whose forward asks for values
        return False
    finally:
        hook.remove()
    return len(returned) == 1 and logits is returned[0]


def _own_terms(model: Any, arguments: dict[str, Any], plain: bool) -> tuple[bool, bool]:
    """Return whether the model adds terms to its loss, and whether these depend on the logits."""
    ids = _two_tokens(model)
    called: list[bool] = []

    def nothing(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        called.append(True)
        return torch.zeros((), device=ids.device)

    def terms(head_output: float | None) -> Tensor:
        with ExitStack() as changes:
            if head_output is not None:
                output = torch.tensor(head_output, device=ids.device)
                changes.enter_context(head_computes(model.get_output_embeddings(), lambda hidden: output.clone()))
            loss: Tensor | None = model(input_ids=ids, labels=ids, use_cache=False, **arguments).loss
        return torch.zeros((), device=ids.device) if loss is None else loss

    with _loss_function(model, nothing):
        try:
            own_terms = bool(terms(None) != 0) and bool(called)
        except (RuntimeError, NotImplementedError):  # of a model without weights yet
            return bool(arguments), False
        except TypeError:  # without labels there are no terms
            return False, False
        if not own_terms or not plain:
            return own_terms, False
        try:
            return True, bool(terms(0.0) != terms(7.0))
        except (RuntimeError, IndexError):
            return True, True


def _router_arguments(model: Any) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = "output_router_logits" in parameters or (takes_any and hasattr(config, "output_router_logits"))
    return {"output_router_logits": True} if known else {}


def _two_tokens(model: Any) -> Tensor:
    return torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)


@contextmanager
def _loss_function(model: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    """Temporarily replace the function by which a model computes the loss of logits."""
    before = model.__dict__.get("_loss_function")
    model.loss_function = function
    try:
        yield
    finally:
        del model.__dict__["_loss_function"]
        if before is not None:
            model.loss_function = before
