"""Store results of evaluations in one file per folder and in TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from .. import UsageError
from ..files import write_atomically
from ..modules.networks.weight_files import read_json

FILE = "results.json"
Found = Mapping[str, Any]


class Results:
    """Folder with ``results.json``, ``{"model", "tasks", "corpora", "images"}``, and TensorBoard's events.

    Results of earlier evaluations of the same model are kept.

    Args:
        out: Output folder.
        model: Name of the evaluated model.

    Raises:
        UsageError: The folder contains results of another model, or a file that is not results.
    """

    def __init__(self, out: str | Path, model: str) -> None:
        self.path = Path(out) / FILE
        self._found: dict[str, Any] = read_json(self.path) if self.path.is_file() else {"model": model}
        if self._found.get("model") != model:
            raise UsageError(f"{self.path} contains results of {self._found.get('model')}: choose another --out")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, found: Found) -> None:
        """Add and write results by name, such as ``{"prose": {"loss": 4.2}}``, and log ``eval/prose/loss``."""
        self._found[section] = {**self._found.get(section, {}), **found}
        write_atomically(self.path, json.dumps(self._found, indent=1, sort_keys=True) + "\n")
        logger = TensorBoardLogger(self.path.parent, name="", version="")
        logger.log_metrics(dict(_numbers("eval", found)), step=0)
        logger.finalize("success")


def _numbers(prefix: str, found: Found) -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}/{name}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{name}", float(value)
