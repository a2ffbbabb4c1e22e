"""What came of the comparison's processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...checkpoints.newest import newest_checkpoint
from ...files import write_atomically
from ...modules.networks.weight_files import read_file
from ..shared import RESULT, scalars
from .jobs import DONE, PictureJob

TAGS = ("val/loss", "val/psnr")


@dataclass(frozen=True)
class Outcome:
    """Of a finished job.

    Args:
        key: Hash of what it came from.
        values: By name: of a run what it logged at its end, of a task what it found.
        seconds: Wall-clock time of the process that finished it.
    """

    key: str
    values: dict[str, Any]
    seconds: float


Outcomes = dict[tuple[str, int], Outcome]


class PictureLedger:
    """Outcomes beside the runs they came from."""

    def load(self, job: PictureJob) -> Outcome | None:
        """A job's outcome, where it has one."""
        path = job.folder / RESULT
        if not path.exists():
            return None
        content = json.loads(path.read_text(encoding="utf8"))
        return Outcome(**content) if content["key"] == job.key else None

    def keep(self, job: PictureJob, results: Mapping[tuple[str, int], Outcome], seconds: float) -> Outcome | None:
        """Takes what a task found; of a run what it logged, where its newest checkpoint is that of its last step."""
        values = _found(job) if job.config is None else _logged(job)
        if values is None:
            return None
        outcome = Outcome(job.key, values, round(seconds, 1))
        write_atomically(job.folder / RESULT, json.dumps(asdict(outcome)) + "\n")
        return outcome

    def told(self, outcome: Outcome) -> str:
        """Its numbers."""
        numbers = [f"{name} {value:.4g}" for name, value in outcome.values.items() if isinstance(value, float)]
        return f"{', '.join([*numbers, 'done'])} ({outcome.seconds:.0f} s)"


def _found(job: PictureJob) -> dict[str, Any] | None:
    path = job.folder / DONE
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    return content


def _logged(job: PictureJob) -> dict[str, Any] | None:
    assert job.config is not None
    newest = newest_checkpoint([job.folder])
    if newest is None:
        return None
    position = read_file(newest).get(job.config["data"]["class_path"].rsplit(".", 1)[-1], {})
    if position.get("step") != job.own_steps:
        return None
    corpora = [*job.config["data"]["init_args"]["val"], "average"]
    curves = {f"{tag}/{corpus}": scalars(job.folder, f"{tag}/{corpus}") for tag in TAGS for corpus in corpora}
    return {tag: float(curve[-1][1]) for tag, curve in curves.items() if curve}
