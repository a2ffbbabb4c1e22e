"""Schedules without a callback: one after the other, and as PyTorch's own LR scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .. import UsageError
from .schedule_types import Schedule
from .schedules import Steps, piecewise


def chain(step: Steps, parts: Sequence[tuple[Schedule, int]]) -> Any:
    """Schedules over several datasets in a row, each re-warmed where the one before ends.

    Args:
        step: A step or an array of steps, from 0 over all parts.
        parts: Schedule and length of each dataset.
    """
    return piecewise(step, [(length, partial(schedule.value, length=length)) for schedule, length in parts])


def lambda_lr(optimizer: Optimizer, schedule: Schedule, length: int) -> LambdaLR:
    """A ``LambdaLR`` that follows a schedule, for loops without callbacks; call its ``step`` after each optimizer step.

    The first parameter group gets the schedule's values, the others keep their ratio to it. Unlike
    :class:`~rewurst.callbacks.LRRewarming` it cannot re-warm a restored run: its state counts from step 0.

    Raises:
        UsageError: The first group's learning rate is 0.
    """
    reference = float(optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]))
    if reference == 0:
        raise UsageError("the first parameter group has a learning rate of 0: no factor makes a schedule of it")
    return LambdaLR(optimizer, lambda step: schedule.value(step, length) / reference)
