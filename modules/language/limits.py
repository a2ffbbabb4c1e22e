"""Limits of a model that data must fit: a row for every token, positions for every row."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from ... import UsageError

SPARE_POSITIONS = 8  # tables of some models have a few rows more than they have positions: OPT two


def vocabulary_of(model: Any) -> int:
    """Return the number of tokens that a model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def require_vocabulary(model: nn.Module, tokens: int, extend: bool | int) -> None:
    """Check that a model knows every token, and give it new rows if it does not and may have them.

    Args:
        model: A causal language model of transformers.
        tokens: One more than the highest token of the data.
        extend: Whether the model may be extended, or the multiple that its new size must be of.

    Raises:
        UsageError: The data have more tokens than the model, which may not be extended.
    """
    known = vocabulary_of(model)
    if tokens <= known:
        return
    if not extend:
        raise UsageError(
            f"the tokenizer has {tokens} tokens and the model's vocab_size is {known}: add extend_vocabulary: true to "
            f"the module for new rows at the mean of the old, or, for a new model, set model.vocab_size to {tokens}"
        )
    multiple = int(extend)
    extend_vocabulary(model, -(-tokens // multiple) * multiple)
    rank_zero_info(f"the model's vocabulary was extended from {known} to {vocabulary_of(model)} tokens")


@torch.no_grad()
def extend_vocabulary(model: Any, tokens: int) -> None:
    """Give embeddings and output head new rows, each the mean of the old ones; tied matrices stay tied.

    Args:
        model: A causal language model of transformers.
        tokens: New number of rows.
    """
    known = vocabulary_of(model)
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [None if part is None else part.weight[:known].double().mean(0) for part in parts]
    model.resize_token_embeddings(tokens, mean_resizing=False)
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    for part, mean in zip(parts, means, strict=True):
        if part is None or mean is None or len(part.weight) != tokens:
            raise UsageError(f"extend_vocabulary: {type(model).__name__} cannot be given new tokens")
        part.weight[known:] = mean.to(part.weight.dtype)
        if getattr(part, "bias", None) is not None:
            part.bias[known:] = part.bias[:known].mean()
    for config in (model.config, model.config.get_text_config()):
        config.vocab_size = tokens


def require_positions_for(model: nn.Module, length: int, where: str = "sequence_length") -> None:
    """Check that a model has positions for rows of a length.

    Models with a table of positions cannot read longer rows. Rotary ones can, but were not trained to, so that is only
    a warning.

    Args:
        model: A causal language model of transformers.
        length: Tokens that the model reads of a row.
        where: Setting that says so.

    Raises:
        UsageError: Rows are longer than the model's table of positions.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or length <= positions or positions < 1:
        return
    message = f"{where} is {length}, {type(model).__name__} has {positions} positions (max_position_embeddings)"
    if _has_table(model, positions):
        raise UsageError(f"{message}: prepare rows of at most {positions} tokens")
    if getattr(config, "rope_parameters", None):
        rank_zero_warn(
            f"{message}; it was not trained to read that far: set rope_parameters (rope_type linear, dynamic or yarn, "
            f"and factor {length / positions:g}) and max_position_embeddings, or prepare shorter rows"
        )


def _has_table(model: Any, positions: int) -> bool:
    sizes = range(positions, positions + SPARE_POSITIONS + 1)
    tokens = model.get_input_embeddings()
    if any(isinstance(part, nn.Embedding) and part is not tokens and part.num_embeddings in sizes
           for part in model.modules()):  # fmt: skip
        return True
    return any(tensor.ndim >= 2 and max(tensor.shape[0], tensor.shape[-1]) in sizes for tensor in model.buffers())
