"""Read a run's TensorBoard scalars and the steps of its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

Events = dict[str, list[tuple[int, float]]]
_STEP = re.compile(r"step=(\d+)")


def saved_steps(folder: Path) -> int:
    """Return the latest step in the names of checkpoints under a folder; 0 if there are none."""
    steps = [int(match[1]) for path in folder.rglob("*.ckpt") if (match := _STEP.search(path.name))]
    return max(steps, default=0)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return a tag's scalars over all versions of a run as (logged step, value), the latest value per step."""
    values: dict[int, float] = {}
    for events in versions(folder):
        values.update(events.get(tag, []))  # a resumed run repeats steps
    return sorted(values.items())


def versions(folder: Path) -> list[Events]:
    """Return the scalars by tag of each process of a run, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for version in sorted(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_"))):
        events = EventAccumulator(str(version), size_guidance={"scalars": 0})
        events.Reload()
        found.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    return found
