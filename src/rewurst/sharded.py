"""Telling a sharded checkpoint from other folders, for whoever reads weights: it needs no Lightning."""

from __future__ import annotations

from pathlib import Path


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of shards that :class:`~rewurst.callbacks.FSDP` wrote, whole or not."""
    return (path / ".metadata").is_file() and (path / "meta.pt").is_file()
