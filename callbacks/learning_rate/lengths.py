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
    """Return an amount and its unit, ``"steps"``, ``"tokens"`` or ``"epochs"``; steps for a number without a unit.

    Raises:
        UsageError: The text is not a length, or the amount is below 1.
    """
    match = _PATTERN.fullmatch(str(length))
    if match is None or isinstance(length, float):
        raise UsageError(f'{name} {length!r} is not a length: write steps (700), tokens ("300B tokens") or "1 epoch"')
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
    """Return a length in whole steps, rounded up by the data module's ``tokens_per_step`` or ``epoch_steps``.

    Raises:
        UsageError: The length is in tokens or epochs, which the data module does not count.
    """
    amount, unit = parse_length(length, name)
    if unit == "steps":
        return int(amount)
    attribute = "tokens_per_step" if unit == "tokens" else "epoch_steps"
    steps = getattr(datamodule, attribute, None)
    if steps is None:
        raise UsageError(
            f"{name} {length!r} is in {unit}, but {type(datamodule).__name__} does not count them: "
            f"give it in steps, or give the data module an attribute {attribute}"
        )
    return -(-int(amount) // int(steps)) if unit == "tokens" else max(1, math.ceil(amount * int(steps)))


def counted_optimizers(module: Any, optimizers: int) -> int:
    """Return the number of optimizers whose steps Lightning's ``global_step`` counts in a global batch.

    These are all optimizers, unless the module's attribute ``counted_optimizers`` says otherwise.
    """
    return int(getattr(module, "counted_optimizers", max(optimizers, 1)))
