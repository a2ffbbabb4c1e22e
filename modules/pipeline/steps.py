"""Tensors that the steps of a sampling run see besides the latents, callbacks that may change them, checks for NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ... import UsageError
from ..networks import ConditionCache

TEXT, EMBEDDINGS = "text_encoder_hidden_states", "image_embeddings"  # diffusers' names of what a step sees
OnStep: TypeAlias = Callable[[int, float, dict[str, Tensor | None]], dict[str, Any] | None]
"""Called after a step with its number, its time and tensors by diffusers' names; what it returns takes their place."""


class Seen:
    """Text states and embeddings of a sampling run, and a callback that may change them.

    Args:
        callback: What to call after each step.
        guided: Whether the text states are wanted ones, then as many unwanted ones.
        tensors: By diffusers' names.
    """

    def __init__(self, callback: OnStep | None, guided: bool, tensors: dict[str, Tensor]) -> None:
        self.callback, self.tensors = callback, tensors
        self.unwanted = tensors[TEXT].chunk(2)[1] if guided else None  # stays as it was, as in diffusers
        self.cache: ConditionCache = {}

    def after_step(self, step: int, time: float, x: Tensor) -> Tensor | None:
        """Call back, and take over what is returned."""
        if self.callback is None:
            return None
        found = {"latents": x, **self.tensors, "negative_prompt_embeds": self.unwanted}
        changed = self.callback(step, time, found) or {}
        for name in self.tensors:
            if name in changed and changed[name] is not self.tensors[name]:
                self.tensors[name] = changed[name]
                self.cache.clear()  # it depends on them
        return changed.get("latents")


def finite(values: Tensor, what: str, network: torch.nn.Module) -> Tensor:
    """Return values that are finite.

    Raises:
        UsageError: Some are not, which would be a black picture.
    """
    if not bool(values.isfinite().all()):
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        hint = "give dtype bfloat16 or float32" if dtype == "float16" else "are its weights and inputs right?"
        raise UsageError(f"{what} made values that are not finite, in {dtype}: {hint}")
    return values


def wide(network: torch.nn.Module) -> torch.dtype:
    """Return the precision to sample in: the network's, but at least float32."""
    return torch.promote_types(next(network.parameters()).dtype, torch.float32)
