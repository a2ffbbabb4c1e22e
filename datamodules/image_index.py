"""The index of a corpus of images: ``index.json``, and for each shard what is known of its samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .corpus_index import INDEX_FILE, VERSION, Shard, write_atomically, writing


def write_image_index(
    folder: Path, shards: Sequence[Shard], facts: Sequence[NDArray[Any]], sources: Sequence[str]
) -> None:
    """Write ``<stem>.facts.npy`` beside each shard, then ``index.json``.

    Args:
        folder: Where the shards and their sidecars of offsets lie.
        shards: In the order of the stream.
        facts: Of each shard, ``FACTS_DTYPE``, shape (samples,).
        sources: What was prepared, as it was asked for.
    """
    for shard, rows in zip(shards, facts, strict=True):
        path = (folder / shard.name).with_suffix(".facts.npy")
        with writing(path), path.open("wb") as file:
            np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
    content = {
        "version": VERSION,
        "kind": "images",
        "shards": [asdict(shard) for shard in shards],
        "rows": sum(shard.rows for shard in shards),
        "sources": list(sources),
    }
    with writing(folder / INDEX_FILE):
        write_atomically(folder / INDEX_FILE, json.dumps(content, indent=1) + "\n")
