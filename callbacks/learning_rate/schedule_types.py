"""The functions of :mod:`.schedules` with their numbers, for use in YAML and checkpoints.

A schedule has no length; the callback that uses it has one, in steps or tokens.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ... import UsageError
from . import schedules

__all__ = [
    "Constant",
    "InfiniteCosine",
    "InfiniteInverseSqrt",
    "Schedule",
    "WarmupCosine",
    "WarmupInverseSqrt",
    "WarmupLinear",
    "WarmupStableDecay",
    "chain",
    "lambda_lr",
]


class Schedule(ABC):
    """A value per step; subclasses are frozen dataclasses over one function of :mod:`.schedules`.

    With ``never_ends``, a new dataset continues at the value at which the old one stopped, instead of re-warming.
    """

    function: ClassVar[Callable[..., Any]]
    never_ends: ClassVar[bool] = False

    def value(self, step: schedules.Steps, length: int) -> Any:
        """Return the value for the step-th optimizer step (from 0), for one step or an array of steps."""
        return type(self).function(step, length, **self.numbers())

    def numbers(self) -> dict[str, float]:
        """Return the schedule's arguments by name."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # every subclass is a dataclass

    def state(self) -> dict[str, Any]:
        """Return the state for checkpoints, class name and numbers, which needs no unpickling."""
        return {"name": type(self).__name__, **self.numbers()}

    def describe(self) -> str:
        """Return a readable line, such as ``WarmupCosine(peak=0.0003, minimum=3e-05, warmup=0.01)``."""
        return describe(self.state())


def describe(state: Mapping[str, Any]) -> str:
    """Return the readable line of a schedule's state from a checkpoint."""
    numbers = ", ".join(f"{key}={value}" for key, value in state.items() if key != "name")
    return f"{state['name']}({numbers})"


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

    Args:
        level: Value at every step.
    """

    level: float
    function = staticmethod(lambda step, length, level: schedules.constant(step, length, level))

    def __post_init__(self) -> None:
        _not_negative(self, "level")


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up and cosine decay, which both papers use for re-warming and re-decaying.

    Args:
        peak: Value at the end of the warm-up.
        minimum: Value at the end; the papers use a tenth of the peak.
        warmup: Fraction of the length spent warming up.
    """

    peak: float
    minimum: float
    warmup: float = 0.01
    function = staticmethod(schedules.warmup_cosine)

    def __post_init__(self) -> None:
        _peak_over_minimum(self)
        _increasing(self, "warmup")


@dataclass(frozen=True)
class WarmupLinear(WarmupCosine):
    """Linear warm-up and linear decay, with the arguments of :class:`WarmupCosine`."""

    function = staticmethod(schedules.warmup_linear)


@dataclass(frozen=True)
class WarmupInverseSqrt(WarmupCosine):
    """Linear warm-up and inverse-square-root decay.

    Args:
        peak: Value at the end of the warm-up.
        minimum: Value at the end.
        warmup: Fraction of the length spent warming up.
        alpha: Steepness of the decay, above 0.
    """

    alpha: float = 10.0
    function = staticmethod(schedules.warmup_inverse_sqrt)

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "alpha")


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """WSD: warm-up, a constant peak, a linear decay at the end.

    Args:
        peak: Value of the constant phase.
        minimum: Value at the end.
        warmup: Fraction of the length spent warming up.
        decay: Fraction of the length spent decaying.
    """

    peak: float
    minimum: float
    warmup: float = 0.01
    decay: float = 0.1
    function = staticmethod(schedules.warmup_stable_decay)

    def __post_init__(self) -> None:
        _peak_over_minimum(self)
        _increasing(self, "warmup")
        _increasing(self, "decay")
        if self.warmup + self.decay > 1:
            raise _error(self, f"warmup {self.warmup} and decay {self.decay} overlap: their sum must be at most 1")


@dataclass(frozen=True)
class InfiniteCosine(Schedule):
    """Warm-up, cosine cool-down, a constant phase for any number of datasets, and annealing for a release.

    Args:
        peak: Value at the end of the warm-up.
        constant: Value of the constant phase.
        minimum: Value at the end of the annealing.
        warmup: Fraction of the length at which the warm-up ends.
        cooldown_until: Fraction of the length at which the cool-down ends.
        constant_until: Fraction of the length at which the constant phase ends.
    """

    peak: float
    constant: float
    minimum: float
    warmup: float = 0.01
    cooldown_until: float = 0.6
    constant_until: float = 0.85
    function = staticmethod(schedules.infinite_cosine)
    never_ends = True

    def __post_init__(self) -> None:
        _peak_over_minimum(self)
        _positive(self, "minimum")
        if not self.minimum <= self.constant <= self.peak:
            raise _error(self, f"constant {self.constant} must be between minimum {self.minimum} and peak {self.peak}")
        _increasing(self, "warmup", "cooldown_until", "constant_until")

    def constant_phase(self, length: int) -> tuple[int, int]:
        """Return the first step of the constant phase and the first step after it."""
        return round(self.cooldown_until * length), round(self.constant_until * length)


@dataclass(frozen=True)
class InfiniteInverseSqrt(InfiniteCosine):
    """The schedule of :class:`InfiniteCosine` with an inverse-square-root cool-down.

    Args:
        peak: Value at the end of the warm-up.
        constant: Value of the constant phase.
        minimum: Value at the end of the annealing.
        warmup: Fraction of the length at which the warm-up ends.
        cooldown_until: Fraction of the length at which the cool-down ends.
        constant_until: Fraction of the length at which the constant phase ends.
        alpha: Steepness of the cool-down, above 0.
    """

    alpha: float = 10.0
    function = staticmethod(schedules.infinite_inverse_sqrt)

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "alpha")


def _peak_over_minimum(schedule: Schedule) -> None:
    numbers = schedule.numbers()
    _not_negative(schedule, "minimum")
    if numbers["peak"] < numbers["minimum"]:
        raise _error(schedule, f"peak {numbers['peak']} is below minimum {numbers['minimum']}")
    _positive(schedule, "peak")


def _increasing(schedule: Schedule, *names: str) -> None:
    """Check that fractions of a length are in [0, 1] and do not decrease."""
    before, floor = "0", 0.0
    for name in names:
        value = schedule.numbers()[name]
        if not floor <= value <= 1:
            raise _error(schedule, f"{name} {value} must be between {before} and 1 (a fraction of the length)")
        before, floor = f"{name} {value}", value


def _positive(schedule: Schedule, name: str) -> None:
    if schedule.numbers()[name] <= 0:
        raise _error(schedule, f"{name} {schedule.numbers()[name]} must be above 0")


def _not_negative(schedule: Schedule, name: str) -> None:
    if schedule.numbers()[name] < 0:
        raise _error(schedule, f"{name} {schedule.numbers()[name]} must not be below 0")


def _error(schedule: Schedule, message: str) -> UsageError:
    return UsageError(f"{type(schedule).__name__}: {message}")


def chain(step: schedules.Steps, parts: Sequence[tuple[Schedule, int]]) -> Any:
    """Return the values of schedules over successive datasets, each re-warmed at the end of the previous one.

    Args:
        step: Step or array of steps, from 0 over all parts.
        parts: Schedule and length of each dataset.
    """
    return schedules.piecewise(step, [(length, partial(schedule.value, length=length)) for schedule, length in parts])


def lambda_lr(optimizer: Optimizer, schedule: Schedule, length: int) -> LambdaLR:
    """Build a ``LambdaLR`` from a schedule, for loops without callbacks; call its ``step`` after each optimizer step.

    The first parameter group gets the schedule's values, and the others keep their ratio to it. Unlike
    :class:`~rewurst.callbacks.LRRewarming`, it cannot re-warm a restored run, because it counts from step 0.

    Raises:
        UsageError: The first group's learning rate is 0, or a group has none.
    """
    reference = initial_rates(optimizer)[0]
    if reference == 0:
        raise UsageError("the first parameter group has a learning rate of 0, which a schedule cannot scale")
    return LambdaLR(optimizer, lambda step: schedule.value(step, length) / reference)


def initial_rates(optimizer: Optimizer) -> list[float]:
    """Return the initial learning rates of an optimizer's groups, before any schedule.

    Raises:
        UsageError: A group has none because the optimizer computes its own, such as Adafactor with relative steps.
    """
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if None in rates:
        raise UsageError(
            f"{type(optimizer).__name__} has lr None, so it computes its own learning rate: give it a number (and "
            "relative_step: false for Adafactor), or leave the schedule out"
        )
    return [float(rate) for rate in rates]
