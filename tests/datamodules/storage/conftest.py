"""Fixtures: a server, a cache and the pauses between attempts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from remote_objects import BLOCK, CONTENT

from rewurst.datamodules.storage import remote
from rewurst.datamodules.storage.block_cache import BlockCache


@pytest.fixture
def server(loopback: Any) -> Any:
    """Start an http server with two objects."""
    loopback.behaviour.objects |= {"/a/x.tar": CONTENT, "/empty": b""}
    return loopback


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record pauses instead of sleeping."""
    made: list[float] = []
    monkeypatch.setattr(remote, "sleep", made.append)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "cache", block_bytes=BLOCK)
