"""What a finished run logged: losses over steps, kept beside it so that nothing is read twice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ...checkpoints.newest import newest_checkpoint
from ...files import write_atomically
from ..shared import RESULT, Events, _versions
from .jobs import Job

Curve = list[tuple[int, float]]


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
    tokens: int
    steps: int
    share_read: float
    seconds: float

    def final(self, corpus: str) -> float:
        """Loss at the end."""
        return self.losses[corpus][-1][1]


Results = dict[tuple[str, int], Result]
"""By run and seed."""


class LossLedger:
    """Results of runs by what they logged."""

    def load(self, job: Job) -> Result | None:
        """A job's result, where it has one."""
        return load_result(job)

    def keep(self, job: Job, results: Results, seconds: float) -> Result | None:
        """Reads what a run logged and keeps it, and the newest of its checkpoints alone."""
        result = keep_result(job, results.get(job.parent.name) if job.parent else None, seconds)
        if result is not None:
            drop_older_checkpoints(job.folder)
        return result

    def told(self, result: Result) -> str:
        """Losses at the end."""
        losses = ", ".join(f"{corpus} {result.final(corpus):.3f}" for corpus in result.losses)
        return f"{losses} ({result.seconds:.0f} s)"


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
    versions = _versions(job.folder)
    losses = {}
    for corpus in job.config["data"]["init_args"]["val"]:
        first = [before.losses[corpus][-1]] if before is not None and corpus in before.losses else []
        losses[corpus] = first + _validations(job, versions, f"val/loss/{corpus}")
    if any(not curve or curve[-1][0] < job.steps for curve in losses.values()):
        return None
    shares = [value for events in versions for _, value in events.get("replay/share_read", [])]
    share = shares[-1] if shares else 0.0
    result = Result(job.key, losses, job.steps * job.tokens_per_step, job.steps, share, round(seconds, 1))
    write_atomically(job.folder / RESULT, json.dumps(asdict(result)) + "\n")
    return result


def _validations(job: Job, versions: list[Events], tag: str) -> Curve:
    """A run's own validations: (steps done, loss), at its interval.

    With n steps done Lightning logs as step n - 1, or otherwise where the process went on from a checkpoint. So what
    was logged with it as ``tokens`` says how many there were. Validations in between are made as a process is stopped.
    """
    found: dict[int, float] = {}
    for events in versions:
        counted = events.get("tokens", [])
        if counted:
            step, tokens = counted[-1]
            ahead = round(tokens / job.tokens_per_step) - step
            found.update((step + ahead, value) for step, value in events.get(tag, []))
    return sorted((step, value) for step, value in found.items() if step > job.start and step % job.every == 0)


def drop_older_checkpoints(folder: Path) -> None:
    """Removes all checkpoints under a folder but the newest."""
    newest = newest_checkpoint([folder])
    for path in folder.rglob("*.ckpt"):
        if path.is_file() and path != newest:
            path.unlink()
