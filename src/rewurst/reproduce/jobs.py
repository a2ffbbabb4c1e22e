"""Jobs of a study and their results."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from ..files import write_atomically
from .configs import Config, write_config
from .logged import saved_steps

Name = tuple[str, int]
"""Kind and seed of a job."""

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Job that is a run of ``rewurst fit``.

    Args:
        kind: Name among the jobs of a seed.
        seed: Seed of the initial weights and of the order of the data.
        key: Hash of everything that decides the outcome, including the needed jobs.
        folder: Output folder.
        own_steps: Number of own steps; 1 for a task.
        needs: Jobs that must end before this one begins.
        config: Config of the run; empty for a task.
        start: Absolute step at which it begins.
    """

    kind: str
    seed: int
    key: str
    folder: Path
    own_steps: int
    needs: tuple[Job, ...] = ()
    config: Config = field(default_factory=dict)
    start: int = 0

    @property
    def name(self) -> Name:
        """Kind and seed of this job."""
        return self.kind, self.seed

    @property
    def label(self) -> str:
        """Name in messages."""
        return f"{self.kind} seed {self.seed}"

    def command(self) -> list[str]:
        """Write the process's input into the folder and return the arguments of Python."""
        return ["-m", "rewurst.train", "fit", "--config", str(write_config(self.folder, self.config))]

    def steps_done(self) -> int:
        """Return the number of own steps in its newest checkpoint."""
        return max(0, saved_steps(self.folder) - self.start)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a finished job.

    Args:
        key: Key of the job.
        seconds: Wall-clock time of its last process.
    """

    key: str
    seconds: float

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Build a result from the content of ``result.json``."""
        return cls(**content)

    def summary(self) -> str:
        """Return the result in a few words."""
        raise NotImplementedError


J = TypeVar("J", bound=Job)
R = TypeVar("R", bound=Result)


class Ledger(ABC, Generic[J, R]):
    """Ledger of jobs' results, stored next to their logs so that nothing is read twice."""

    result: ClassVar[type[Result]]

    def load(self, job: J) -> R | None:
        """Return a job's stored result; None if there is none."""
        path = job.folder / RESULT
        content = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
        return self._made(content) if content.get("key") == job.key else None

    def keep(self, job: J, results: Mapping[Name, R], seconds: float) -> R | None:
        """Read and store the result of a process.

        Args:
            job: Job of the process.
            results: Results of other jobs so far.
            seconds: Wall-clock time of the process.

        Returns:
            The result; None if the job has not finished.
        """
        values = self.read(job, results)
        if values is None:
            return None
        made = self._made({"key": job.key, "seconds": round(seconds, 1), **values})
        write_atomically(job.folder / RESULT, json.dumps(asdict(made)) + "\n")
        return made

    @abstractmethod
    def read(self, job: J, results: Mapping[Name, R]) -> dict[str, Any] | None:
        """Return the fields of a job's result; None if the job has not finished."""

    def _made(self, content: dict[str, Any]) -> R:
        made: R = self.result.from_json(content)  # type: ignore[assignment]
        return made
