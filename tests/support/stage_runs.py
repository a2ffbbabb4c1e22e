"""Trainers for tests of the stages, and the values that their runs logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from rewurst.callbacks import ExactResume, LRRewarming, WarmupCosine, WeightAverage


def logged_trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "logger": CSVLogger(folder),
        "check_val_every_n_epoch": None,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", [])),
    }
    return Trainer(**{**defaults, **options})


def trainer(folder: Path, **options: Any) -> Trainer:
    """Return a trainer that does not validate."""
    return logged_trainer(folder, **{"val_check_interval": 10_000, "limit_val_batches": 0, **options})


def fit_six_steps(folder: Path, name: str, module: Any, data: Any, ckpt_path: Path | None) -> tuple[Any, list[float]]:
    """Run six steps with averaged weights and checkpoints; return the last checkpoint and the losses."""
    callbacks = [
        LRRewarming(WarmupCosine(1e-2, 1e-3, 0.1), 6),
        WeightAverage(0.5, every=2, start_step=3),
        ExactResume(),
        ModelCheckpoint(folder / name, "{step}", every_n_train_steps=1, save_top_k=-1),
    ]
    run = trainer(folder, max_steps=6, callbacks=callbacks, val_check_interval=4, limit_val_batches=1.0)
    run.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return torch.load(folder / name / "step=6.ckpt", weights_only=True), column(run.logger, "train/loss")


def column(logger: Any, key: str) -> list[float]:
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    values = [dict(zip(header.split(","), line.split(","), strict=True))[key] for line in lines]
    return [float(value) for value in values if value]


def time_of(quantile: float, high_noise_share: float) -> float:
    """Return a training time by its quantile: 0.85 to 0.99 below the share, else 0.001 to 1, of which 7.4 % are 1."""
    if quantile < high_noise_share:
        return 0.85 + 0.14 * quantile / high_noise_share
    return min((1 - (quantile - high_noise_share) / (1 - high_noise_share)) * 1.08 + 0.001, 1.0)
