"""Read the results of the comparison's jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...checkpoints.newest import newest_checkpoint
from ...modules.networks.weight_files import read_file
from ..jobs import Job, Ledger, Name, Result
from ..logged import scalars
from .jobs import DONE, Task

TAGS = ("val/loss", "val/psnr")


@dataclass(frozen=True, kw_only=True)
class Outcome(Result):
    """Result of a finished job.

    Args:
        values: Numbers by name: a run's last logged values, or the findings of a task.
    """

    values: dict[str, Any]

    def summary(self) -> str:
        """Return the numbers as text."""
        numbers = [f"{name} {value:.4g}" for name, value in self.values.items() if isinstance(value, float)]
        return f"{', '.join([*numbers, 'done'])} ({self.seconds:.0f} s)"


Outcomes = Mapping[Name, Outcome]


class PictureLedger(Ledger[Job, Outcome]):
    """Ledger of outcomes of runs and tasks."""

    result = Outcome

    def read(self, job: Job, results: Outcomes) -> dict[str, Any] | None:
        """Return a task's findings, or a run's logged values if its newest checkpoint is from the last step."""
        values = _found(job) if isinstance(job, Task) else _logged(job)
        return None if values is None else {"values": values}


def _found(job: Job) -> dict[str, Any] | None:
    path = job.folder / DONE
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    return content


def _logged(job: Job) -> dict[str, Any] | None:
    newest = newest_checkpoint([job.folder])
    if newest is None:
        return None
    position = read_file(newest).get(job.config["data"]["class_path"].rsplit(".", 1)[-1], {})
    if position.get("step") != job.own_steps:
        return None
    corpora = [*job.config["data"]["init_args"]["val"], "average"]
    curves = {f"{tag}/{corpus}": scalars(job.folder, f"{tag}/{corpus}") for tag in TAGS for corpus in corpora}
    return {tag: float(curve[-1][1]) for tag, curve in curves.items() if curve}
