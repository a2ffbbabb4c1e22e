"""A server, a cache and the pauses between tries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from remote_objects import BLOCK, CONTENT

from rewurst.datamodules.storage import remote
from rewurst.datamodules.storage.block_cache import BlockCache


@pytest.fixture
def server(loopback: Any) -> Any:
    """An http server with two objects."""
    loopback.behaviour.objects |= {"/a/x.tar": CONTENT, "/empty": b""}
    return loopback


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that would have been made."""
    made: list[float] = []
    monkeypatch.setattr(remote, "sleep", made.append)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "cache", block_bytes=BLOCK)
