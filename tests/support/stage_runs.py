"""Trainers for tests of the stages, and what their runs logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger


def trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "logger": CSVLogger(folder),
        "check_val_every_n_epoch": None,
        "val_check_interval": 10_000,
        "limit_val_batches": 0,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", [])),
    }
    return Trainer(**{**defaults, **options})


def column(logger: Any, key: str) -> list[float]:
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    values = [dict(zip(header.split(","), line.split(","), strict=True))[key] for line in lines]
    return [float(value) for value in values if value]
