"""Clocks: the host's time by part of a run, and the time of steps on the device, measured without waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler

Mark = float | torch.cuda.Event


class PartTimes:
    """Seconds that the host spends in each part of a run; nested parts do not count for the outer one.

    Args:
        names: Names of the parts; time in no other part belongs to the first.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        self._stack, self._since = [names[0]], time.perf_counter()

    def enter(self, name: str) -> None:
        """Begins a part."""
        self._advance()
        self._stack.append(name)

    def leave(self) -> None:
        """Return to the enclosing part."""
        self._advance()
        if len(self._stack) > 1:
            self._stack.pop()

    def read(self) -> dict[str, float]:
        """Return the seconds of every part so far."""
        self._advance()
        return dict(self.seconds)

    @property
    def depth(self) -> int:
        """Number of open parts, not counting the first."""
        return len(self._stack) - 1

    def _advance(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now


class PartProfiler(Profiler):
    """Profiler that forwards to the Trainer's profiler and reports the start and end of actions.

    Lightning reports its actions to the profiler, and only there can both ends of waiting for a batch and of saving a
    checkpoint be observed.

    Args:
        inner: The Trainer's own profiler.
        began: Function called with the action's name at its start.
        ended: Function called with the action's name at its end.
    """

    def __init__(self, inner: Profiler, began: Callable[[str], None], ended: Callable[[str], None]) -> None:
        super().__init__(inner.dirpath, inner.filename)
        self.inner, self._began, self._ended = inner, began, ended

    def start(self, action_name: str) -> None:
        """Start an action."""
        self._began(action_name)
        self.inner.start(action_name)

    def stop(self, action_name: str) -> None:
        """End an action."""
        self.inner.stop(action_name)
        self._ended(action_name)

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Call the Trainer's profiler."""
        self.inner.setup(*args, **kwargs)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Call the Trainer's profiler."""
        self.inner.teardown(*args, **kwargs)

    def describe(self) -> None:
        """Call the Trainer's profiler."""
        self.inner.describe()

    def summary(self) -> str:
        """Return the summary of the Trainer's profiler."""
        return self.inner.summary()


class StepClock:
    """Clock of training steps on a device, without pauses, read when the device has finished them.

    On CUDA it records events in the stream, and the host only asks which have passed, without waiting. On other
    devices it uses the host's time.

    Args:
        device: Device that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._spans: list[tuple[Mark, Mark]] = []
        self._begin: Mark | None = self._mark()
        self._waiting: list[tuple[list[tuple[Mark, Mark]], Any]] = []

    def pause(self) -> None:
        """Stop until ``resume``."""
        if self._begin is not None:
            self._spans.append((self._begin, self._mark()))
            self._begin = None

    def resume(self) -> None:
        """Continue if paused."""
        if self._begin is None:
            self._begin = self._mark()

    def lap(self, what: Any) -> None:
        """End a step; ``passed`` returns ``what`` with its seconds."""
        self.pause()
        self._begin = self._spans[-1][1]
        self._waiting.append((self._spans, what))
        self._spans = []

    def passed(self) -> list[tuple[float, Any]]:
        """Return the seconds of the steps that the device has finished since the last call, in order."""
        done = []
        while self._waiting and self._has_passed(self._waiting[0][0][-1][1]):
            spans, what = self._waiting.pop(0)
            done.append((sum(self._seconds(begin, end) for begin, end in spans), what))
        return done

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @staticmethod
    def _has_passed(mark: Mark) -> bool:
        return isinstance(mark, float) or bool(mark.query())  # type: ignore[no-untyped-call]

    @staticmethod
    def _seconds(begin: Mark, end: Mark) -> float:
        if isinstance(begin, float) or isinstance(end, float):
            return float(end) - float(begin)  # type: ignore[arg-type]
        return float(begin.elapsed_time(end)) / 1000
