"""Compute keys of jobs: hashes of what decides the outcome, to find finished work without confusing it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import UsageError
from .configs import Config

KEY_DIGITS = 10  # in the names of folders
_WITHOUT_EFFECT = (
    "logger",
    "profiler",
    "log_every_n_steps",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "devices",
    "num_nodes",
)


def deciding(trainer: Config, callbacks: Sequence[str]) -> Config:
    """Return the trainer's settings that decide a run's outcome.

    Args:
        trainer: All settings.
        callbacks: Class paths of the callbacks that affect the outcome; others only log and save.
    """
    settings = {
        name: value for name, value in trainer.items() if name not in _WITHOUT_EFFECT and not name.startswith("enable_")
    }
    return settings | {"callbacks": [each for each in trainer["callbacks"] if each["class_path"] in callbacks]}


def digest(content: Any) -> str:
    """Return the SHA-256 of any JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(path: str) -> str:
    """Return the hash of a corpus's index, which contains those of its shards; the path does not matter.

    Raises:
        UsageError: The folder has no index.
    """
    index = Path(path) / "index.json"
    if not index.exists():
        raise UsageError(f"{path} is not a prepared corpus: it has no index.json; see `rewurst prepare text --help`")
    return hashlib.sha256(index.read_bytes()).hexdigest()
