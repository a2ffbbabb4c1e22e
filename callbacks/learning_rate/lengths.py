"""Lengths as people write them: steps (700), tokens ("300B tokens"), epochs ("1 epoch") or "to max_steps"."""

from __future__ import annotations

import math
import re
from typing import Any

from ... import UsageError

_PATTERN = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*([kKMBT]?)\s*(steps?|tokens?|epochs?)?\s*")
TO_MAX_STEPS = "to max_steps"
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_length(length: int | str, name: str = "length") -> tuple[float, str]:
    """An amount and its unit, ``"steps"``, ``"tokens"`` or ``"epochs"``; a bare number is steps.

    Raises:
        UsageError: The text is no length, or the amount is below 1.
    """
    match = _PATTERN.fullmatch(str(length))
    if match is None or isinstance(length, float):
        raise UsageError(f'{name} {length!r} is no length: write steps (700), tokens ("300B tokens") or "1 epoch"')
    number, factor, unit = match.groups()
    amount = float(number.replace("_", "")) * _FACTORS[factor]
    if unit and unit.startswith("epoch"):
        if amount <= 0:
            raise UsageError(f"{name} {length!r} must be above 0")
        return amount, "epochs"
    amount = round(amount)
    if amount < 1:
        raise UsageError(f"{name} {length!r} must be at least 1")
    return amount, "tokens" if unit and unit.startswith("token") else "steps"


def in_steps(length: int | str, datamodule: Any, name: str = "length") -> int:
    """A length in whole steps; tokens round up by the data module's ``tokens_per_step``, epochs by its ``epoch_steps``.

    Raises:
        UsageError: Tokens or epochs are asked for and the data module counts none.
    """
    amount, unit = parse_length(length, name)
    if unit == "steps":
        return int(amount)
    attribute = "tokens_per_step" if unit == "tokens" else "epoch_steps"
    steps = getattr(datamodule, attribute, None)
    if steps is None:
        raise UsageError(
            f"{name} {length!r} is in {unit}, but {type(datamodule).__name__} counts none: "
            f"give it in steps, or give the data module an attribute {attribute}"
        )
    return -(-int(amount) // int(steps)) if unit == "tokens" else max(1, math.ceil(amount * int(steps)))


def counted_optimizers(module: Any, optimizers: int) -> int:
    """How many optimizers' steps Lightning's ``global_step`` counts in a global batch.

    All of them, unless the module sees to it that it does not and says so by an attribute ``counted_optimizers``.
    """
    return int(getattr(module, "counted_optimizers", max(optimizers, 1)))
