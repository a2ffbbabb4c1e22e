"""A folder for other programs at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from .. import UsageError

MARKER = "rewurst.json"


@runtime_checkable
class Exportable(Protocol):
    """Interface of a module that can be exported by :class:`ExportAtEnd`."""

    def export(self, folder: Path, tokenizer: Path) -> None:
        """Write the model and a tokenizer into a folder, which is replaced."""


class ExportAtEnd(Callback):
    """Writes the trained model and its tokenizer as a Hugging Face folder when training ends.

    The folder appears whole or not at all. An export of an earlier run is replaced; anything else in its place is
    refused before training.

    Args:
        folder: Folder to write.

    Raises:
        UsageError: The folder has something else, the module cannot be exported, or the data has no tokenizer.

    Example::

        Trainer(callbacks=[ExportAtEnd("runs/my_text/model")]).fit(module, data)
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before training what could not be written after it."""
        if stage != "fit":
            return
        folder = Path(self.folder)
        if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"ExportAtEnd: {folder} is not an export of a run; choose another folder")
        if not isinstance(pl_module, Exportable):
            raise UsageError(f"ExportAtEnd: {type(pl_module).__name__} has no method export")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Exportable)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer = getattr(datamodule, "tokenizer_folder", None)
        if not tokenizer:
            raise UsageError(f"ExportAtEnd: {type(datamodule).__name__} knows no tokenizer_folder")
        pl_module.export(Path(self.folder), Path(tokenizer))
        made = {"step": trainer.global_step, "dataset": getattr(datamodule, "dataset", None)}
        (Path(self.folder) / MARKER).write_text(json.dumps(made) + "\n", encoding="utf8")
        rank_zero_info(f"{self.folder}: the model after step {trainer.global_step}")
