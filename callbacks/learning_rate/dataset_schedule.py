"""One dataset's part of a run: its schedule, its start, and how it continues after a restore; without Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ... import UsageError
from . import schedules
from .schedule_types import InfiniteCosine, Schedule, describe

State = Mapping[str, Any]


@dataclass
class DatasetRun:
    """Schedule over one dataset, from an absolute start step.

    Args:
        dataset: Name of the data being learned.
        schedule: Schedule of the value.
        length: Length of the schedule in steps.
        extension: Number of steps added to the constant phase of a schedule that never ends.
        anneal_length: Number of steps of an annealing that begins at the checkpoint's step.
        start: Absolute step at which the dataset began, or None if not known yet.
        continues: Whether it began in the constant phase of the previous dataset.
        anneal_start: Absolute step at which the annealing began.
    """

    dataset: str
    schedule: Schedule
    length: int
    extension: int = 0
    anneal_length: int | None = None
    start: int | None = None
    continues: bool = False
    anneal_start: int | None = None

    def value(self, step: int) -> float:
        """Return the value at an absolute step."""
        assert self.start is not None
        position = step - self.start
        if not isinstance(self.schedule, InfiniteCosine):
            return float(self.schedule.value(position, self.length))
        if self.anneal_start is not None and self.anneal_length is not None and step >= self.anneal_start:
            level, minimum = self.schedule.constant, self.schedule.minimum
            return float(schedules.exponential(step - self.anneal_start, self.anneal_length, level, minimum))
        first, end = self.schedule.constant_phase(self.length)
        if self.continues:
            position = max(position, first)
        if position >= end:
            position = max(end, position - self.extension)
        return float(self.schedule.value(position, self.length))

    @property
    def end(self) -> int:
        """Absolute step after which the value no longer changes."""
        assert self.start is not None
        if self.anneal_start is not None and self.anneal_length is not None:
            return self.anneal_start + self.anneal_length
        return self.start + self.length + self.extension

    def state(self) -> dict[str, Any]:
        """Return the state for checkpoints, as plain values."""
        return {
            "dataset": self.dataset,
            "schedule": self.schedule.state(),
            "length": self.length,
            "start_step": self.start,
            "continues": self.continues,
            "constant_extension": self.extension,
            "anneal": None if self.anneal_start is None else [self.anneal_start, self.anneal_length],
        }

    def resume(self, state: State, step: int) -> None:
        """Resume the stored run of the same dataset at a step.

        Raises:
            UsageError: Numbers differ under the same name, other than a longer constant phase.
        """
        kept = f"{describe(state['schedule'])} over {state['length']} steps"
        asked = f"{self.schedule.describe()} over {self.length} steps"
        if kept != asked:
            raise UsageError(
                f"dataset {self.dataset!r} was started with {kept}, now it is {asked}: keep the numbers, "
                "or give the new schedule a new dataset name"
            )
        self.start, self.continues = state["start_step"], state["continues"]
        if self.extension != state["constant_extension"]:
            self._extend(state, step)
        if state["anneal"] is not None:
            self.anneal_start, length = state["anneal"]
            if self.anneal_length != length:
                raise UsageError(f"anneal_length {self.anneal_length} differs from the {length} steps it began with")
        elif self.anneal_length is not None:
            _require_constant_phase(state, step, "anneal_length: annealing")
            self.anneal_start = step

    def follow(self, state: State | None, step: int) -> None:
        """Prepare to begin after a different dataset, or after a checkpoint without state.

        Raises:
            UsageError: A schedule that never ends would have to continue from outside its constant phase.
        """
        self.start, self.anneal_start = None, None
        self.continues = False
        if state is None or not isinstance(self.schedule, InfiniteCosine) or "constant_until" not in state["schedule"]:
            return
        self.continues = True
        _require_constant_phase(state, step, f"dataset {self.dataset!r}")
        kept = state["schedule"]["constant"]
        if kept != self.schedule.constant:
            raise UsageError(
                f"dataset {self.dataset!r}: constant {self.schedule.constant} differs from the {kept} of "
                f"{state['dataset']!r}: a schedule that never ends keeps the value"
            )

    def _extend(self, state: State, step: int) -> None:
        kept = state["constant_extension"]
        if self.extension < kept:
            raise UsageError(f"constant_extension of dataset {self.dataset!r} was {kept} steps: it can only grow")
        assert isinstance(self.schedule, InfiniteCosine)
        end = state["start_step"] + self.schedule.constant_phase(self.length)[1] + kept
        if step > end:
            raise UsageError(f"constant_extension: the constant phase of {self.dataset!r} ended at step {end} already")


def _require_constant_phase(state: State, step: int, what: str) -> None:
    """Check that a new dataset or an annealing begins within the constant phase."""
    numbers = {key: value for key, value in state["schedule"].items() if key != "name"}
    phase = InfiniteCosine(**{key: value for key, value in numbers.items() if key != "alpha"})
    first, end = phase.constant_phase(state["length"])
    first = state["start_step"] + (0 if state["continues"] else first)
    end = state["start_step"] + end + state["constant_extension"]
    annealed = state["anneal"] is not None or step > end
    if annealed or step < first:
        raise UsageError(
            f"{what} must begin in the constant phase of {state['dataset']!r}, steps {first} to {end}: the checkpoint "
            f"is at step {step}{', after annealing has begun' if annealed else ''}"
        )
