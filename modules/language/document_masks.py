"""Rows that hold several documents: attention, positions and losses that do not cross from one into the next."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ... import UsageError

IGNORED = -100


def document_positions(input_ids: Tensor, end_token: int) -> tuple[Tensor, Tensor]:
    """Return the number of each token's document in its row, and the token's position in the document.

    An end token is the last of its document. Nothing here waits for the device.

    Args:
        input_ids: (rows, length).
        end_token: The token that ends a document.

    Returns:
        Documents and positions, both (rows, length), int64.
    """
    ends = input_ids == end_token
    after_end = torch.zeros_like(ends)
    after_end[:, 1:] = ends[:, :-1]
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    begins = torch.where(after_end, index, 0).cummax(1).values
    return after_end.cumsum(1), index - begins


def block_causal_mask(documents: Tensor) -> Tensor:
    """(rows, 1, length, length), true where a token may look: back, and in its own document.

    Args:
        documents: Number of each token's document, (rows, length).
    """
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def document_arguments(model: nn.Module, input_ids: Tensor, end_token: int) -> dict[str, Tensor]:
    """Return the arguments with which a transformers model keeps documents apart.

    Under scaled dot-product attention that is a mask of ours. Everywhere else (flash and flex attention, sliding
    windows) positions alone: transformers reads documents from where they restart, and for that waits for the
    device once per step.
    """
    documents, positions = document_positions(input_ids, end_token)
    arguments = {"position_ids": positions}
    if _takes_our_mask(model.config):
        arguments["attention_mask"] = block_causal_mask(documents)
    return arguments


def document_targets(input_ids: Tensor, targets: Tensor, end_token: int) -> Tensor:
    """Targets without the first token of each document that follows another: nothing before it may predict it."""
    return targets.masked_fill(input_ids == end_token, IGNORED)


def require_positions(model: nn.Module) -> None:
    """Refuses a model that cannot be told where its documents begin.

    Raises:
        UsageError: Its forward takes no ``position_ids``.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UsageError(
            f"document_masks: {type(model).__name__} takes no position_ids, so its documents cannot be kept apart; "
            "leave document_masks out"
        )


def _takes_our_mask(config: Any) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) or kinds != {"full_attention"}
    routed = hasattr(config, "output_router_logits")  # models count the tokens of their experts by a mask of rows
    return getattr(config, "_attn_implementation", None) == "sdpa" and not windowed and not routed
