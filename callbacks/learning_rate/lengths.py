"""Lengths as people write them: steps (700), or tokens ("300B tokens")."""

from __future__ import annotations

import re
from typing import Any

from ... import UsageError

_PATTERN = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*([kKMBT]?)\s*(steps?|tokens?)?\s*")
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_length(length: int | str, name: str = "length") -> tuple[int, str]:
    """An amount and its unit, ``"steps"`` or ``"tokens"``; a bare number is steps.

    Raises:
        UsageError: The text is no length, or the amount is below 1.
    """
    match = _PATTERN.fullmatch(str(length))
    if match is None or isinstance(length, float):
        raise UsageError(f'{name} {length!r} is no length: write steps (700) or tokens ("300B tokens")')
    number, factor, unit = match.groups()
    amount = round(float(number.replace("_", "")) * _FACTORS[factor])
    if amount < 1:
        raise UsageError(f"{name} {length!r} must be at least 1")
    return amount, "tokens" if unit and unit.startswith("token") else "steps"


def in_steps(length: int | str, datamodule: Any, name: str = "length") -> int:
    """A length in whole steps; tokens round up by the data module's ``tokens_per_step``.

    Raises:
        UsageError: Tokens are asked for and the data module counts none.
    """
    amount, unit = parse_length(length, name)
    if unit == "steps":
        return amount
    tokens_per_step = getattr(datamodule, "tokens_per_step", None)
    if tokens_per_step is None:
        raise UsageError(
            f"{name} {length!r} is in tokens, but {type(datamodule).__name__} counts none: "
            "give it in steps, or give the data module an attribute tokens_per_step"
        )
    return -(-amount // int(tokens_per_step))


def counted_optimizers(module: Any, optimizers: int) -> int:
    """How many optimizers' steps Lightning's ``global_step`` counts in a global batch.

    All of them, unless the module sees to it that it does not and says so by an attribute ``counted_optimizers``.
    """
    return int(getattr(module, "counted_optimizers", max(optimizers, 1)))
