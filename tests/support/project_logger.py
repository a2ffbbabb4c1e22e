"""A logger that names folders as WandbLogger does: `name` is the project, `version` an id drawn for each run."""

from __future__ import annotations

import uuid
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment


class ProjectLogger(Logger):
    def __init__(self, project: str, save_dir: str, name: str | None = None, id: str | None = None) -> None:  # noqa: A002
        super().__init__()
        self._wandb_init = {"name": name, "project": project, "dir": save_dir, "id": id}
        self._name, self._id, self._project, self._save_dir = name, id, project, save_dir
        self._experiment: str | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = self._wandb_init["id"] or uuid.uuid4().hex[:8]
        return self._experiment

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str | None:
        return self._experiment or self._id

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...
