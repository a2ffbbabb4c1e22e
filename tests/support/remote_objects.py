"""Contents of the objects that tests of storage serve, and the blocks in a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rewurst.datamodules.storage.block_cache import BlockCache

CONTENT = np.random.default_rng(0).bytes(10_000)


BLOCK = 1024


def blocks(cache: BlockCache) -> list[Path]:
    return [path for path in cache.folder.glob("??/*/*") if path.is_file()]
