"""What a finished run logged: losses over steps, kept beside it so that nothing is read twice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .jobs import Job, write_whole

Curve = list[tuple[int, float]]
RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """One finished run.

    Args:
        key: Hash of the config it came from.
        losses: Validation loss in nats a token by corpus: (absolute steps done, loss), the beginning included where
            the run continues another.
        tokens: Predicted tokens at its end, those of the runs it continues included.
        steps: Absolute steps at its end.
        share_read: Share of its rows that were old ones.
        seconds: Wall-clock time of the process that finished it.
    """

    key: str
    losses: dict[str, Curve]
    tokens: float
    steps: int
    share_read: float
    seconds: float

    def final(self, corpus: str) -> float:
        """Loss at the end."""
        return self.losses[corpus][-1][1]


def load_result(job: Job) -> Result | None:
    """A job's result, where it has one."""
    path = job.folder / RESULT
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf8"))
    if content["key"] != job.key:
        return None
    losses = {corpus: [(int(step), value) for step, value in curve] for corpus, curve in content["losses"].items()}
    return Result(**(content | {"losses": losses}))


def keep_result(job: Job, before: Result | None, seconds: float) -> Result | None:
    """Reads what a run logged and keeps it; nothing where the run has not come to its end.

    Args:
        job: The run.
        before: Result of the run that it continues.
        seconds: How long its process took.
    """
    tokens = scalars(job.folder, "tokens")
    losses = {}
    for corpus in job.config["data"]["init_args"]["val"]:
        # What was logged as step n was logged with n + 1 batches done. A validation before the first one says again
        # what the run before ended on.
        logged = [(step + 1, value) for step, value in scalars(job.folder, f"val/loss/{corpus}")]
        first = [before.losses[corpus][-1]] if before is not None and corpus in before.losses else []
        losses[corpus] = first + [(step, value) for step, value in logged if step > job.start + 1]
    if not tokens or any(not curve or curve[-1][0] < job.steps for curve in losses.values()):
        return None
    step, count = tokens[-1]
    shares = scalars(job.folder, "replay/share_read")
    share = shares[-1][1] if shares else 0.0
    result = Result(job.key, losses, count / (step + 1) * job.steps, job.steps, share, round(seconds, 1))
    write_whole(job.folder / RESULT, json.dumps(asdict(result)) + "\n")
    return result


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard holds of a tag, over all versions of a run: (step as logged, value), the latest of a step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[int, float] = {}
    for version in sorted(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_"))):
        events = EventAccumulator(str(version), size_guidance={"scalars": 0})
        events.Reload()
        if tag in events.Tags()["scalars"]:
            values.update((event.step, event.value) for event in events.Scalars(tag))  # a resumed run repeats steps
    return sorted(values.items())
