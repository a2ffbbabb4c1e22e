"""Read the losses over steps that a finished run logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.newest import newest_checkpoint
from ..jobs import Ledger, Name, Result
from ..logged import Events, versions
from .jobs import RunJob

Curve = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class LossResult(Result):
    """Result of a finished run.

    Args:
        losses: Validation loss in nats per token by corpus: (absolute steps done, loss), including the start if the
            run continues another.
        tokens: Predicted tokens at the end, including those of the runs it continues.
        steps: Absolute step at the end.
        share_read: Share of old rows among those read.
    """

    losses: dict[str, Curve]
    tokens: int
    steps: int
    share_read: float

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LossResult:
        """Build a result from the content of ``result.json``, in which points are lists."""
        curves = {corpus: [(int(step), loss) for step, loss in curve] for corpus, curve in content["losses"].items()}
        return cls(**(content | {"losses": curves}))

    def final(self, corpus: str) -> float:
        """Return the final loss."""
        return self.losses[corpus][-1][1]

    def summary(self) -> str:
        """Return the final losses."""
        losses = ", ".join(f"{corpus} {self.final(corpus):.3f}" for corpus in self.losses)
        return f"{losses} ({self.seconds:.0f} s)"


Results = Mapping[Name, LossResult]


class LossLedger(Ledger[RunJob, LossResult]):
    """Ledger that reads results of runs from their logs."""

    result = LossResult

    def read(self, job: RunJob, results: Results) -> dict[str, Any] | None:
        """Return losses and counts; drop all checkpoints but the newest."""
        before = results.get(job.parent.name) if job.parent else None
        logged = versions(job.folder)
        losses = {}
        for corpus in job.config["data"]["init_args"]["val"]:
            first = [before.losses[corpus][-1]] if before is not None and corpus in before.losses else []
            losses[corpus] = first + _validations(job, logged, f"val/loss/{corpus}")
        if any(not curve or curve[-1][0] < job.steps for curve in losses.values()):
            return None
        drop_older_checkpoints(job.folder)
        shares = [value for events in logged for _, value in events.get("replay/share_read", [])]
        share = shares[-1] if shares else 0.0
        return {"losses": losses, "tokens": job.steps * job.tokens_per_step, "steps": job.steps, "share_read": share}


def _validations(job: RunJob, versions: list[Events], tag: str) -> Curve:
    """Return a run's own validations at its interval: (steps done, loss).

    After n steps Lightning logs step n - 1, or another one if the process resumed from a checkpoint. So the logged
    ``tokens`` give the number of steps. Validations off the interval were made when a process was stopped.
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
    """Remove all checkpoints under a folder but the newest."""
    newest = newest_checkpoint([folder])
    for path in folder.rglob("*.ckpt"):
        if path.is_file() and path != newest:
            path.unlink()
