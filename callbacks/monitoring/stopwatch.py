"""Where the time of a run goes: seconds of parts of the host's time, and of steps on the device without waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler

Mark = float | torch.cuda.Event


class PartTimes:
    """Seconds that the host spent in each part; a part within another is not counted as the outer one.

    Args:
        names: Of the parts; what belongs to none of them is the first.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        self._stack, self._since = [names[0]], time.perf_counter()

    def enter(self, name: str) -> None:
        """Begins a part."""
        self._advance()
        self._stack.append(name)

    def leave(self) -> None:
        """Goes back to the part around it."""
        self._advance()
        if len(self._stack) > 1:
            self._stack.pop()

    def read(self) -> dict[str, float]:
        """Seconds of every part up to now."""
        self._advance()
        return dict(self.seconds)

    @property
    def depth(self) -> int:
        """Parts that are open, without the first."""
        return len(self._stack) - 1

    def _advance(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now


class PartProfiler(Profiler):
    """Passes everything on to the Trainer's profiler, and tells when chosen actions begin and end.

    Lightning names what it does to its profiler, the wait for a batch and the saving of a checkpoint among it, and
    nothing else sees both ends of them.

    Args:
        inner: The Trainer's own.
        began: Called with the action's name.
        ended: The same.
    """

    def __init__(self, inner: Profiler, began: Callable[[str], None], ended: Callable[[str], None]) -> None:
        super().__init__(inner.dirpath, inner.filename)
        self.inner, self._began, self._ended = inner, began, ended

    def start(self, action_name: str) -> None:
        """Begins an action."""
        self._began(action_name)
        self.inner.start(action_name)

    def stop(self, action_name: str) -> None:
        """Ends an action."""
        self.inner.stop(action_name)
        self._ended(action_name)

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's own."""
        self.inner.setup(*args, **kwargs)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's own."""
        self.inner.teardown(*args, **kwargs)

    def describe(self) -> None:
        """As the Trainer's own."""
        self.inner.describe()

    def summary(self) -> str:
        """As the Trainer's own."""
        return self.inner.summary()


class StepClock:
    """Seconds of training on a device, pauses left out, which become known when the device has come so far.

    On CUDA every moment is an event in the stream: the host never waits for one, it asks which have passed. Elsewhere
    a moment is the host's time.

    Args:
        device: That trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._spans: list[tuple[Mark, Mark]] = []
        self._begin: Mark | None = self._mark()
        self._waiting: list[tuple[list[tuple[Mark, Mark]], Any]] = []

    def pause(self) -> None:
        """Stops until ``resume``."""
        if self._begin is not None:
            self._spans.append((self._begin, self._mark()))
            self._begin = None

    def resume(self) -> None:
        """Goes on, if it is paused."""
        if self._begin is None:
            self._begin = self._mark()

    def lap(self, what: Any) -> None:
        """Ends a step; ``what`` comes back with its seconds."""
        self.pause()
        self._begin = self._spans[-1][1]
        self._waiting.append((self._spans, what))
        self._spans = []

    def passed(self) -> list[tuple[float, Any]]:
        """Seconds of the steps that the device has finished since the last call, in order."""
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
