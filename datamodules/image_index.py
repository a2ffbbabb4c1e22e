"""The index of a corpus of captioned images, and the facts beside it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import UsageError
from .corpus_index import CorpusIndex, Shard
from .image_facts import FACTS_DTYPE
from .storage import join, open_bytes
from .targets import Target

FACTS_FILE = "facts.npy"


@dataclass(frozen=True, kw_only=True)
class ImageIndex(CorpusIndex):
    """The contents of ``index.json``; a row is a sample.

    Attributes:
        caption_key: Key of the .json under which captions stand; empty where they are the .txt.
        facts_sha256: Of ``facts.npy``, which decides what filters keep.
    """

    facts_sha256: str
    caption_key: str = ""
    kind: str = "images"

    def check(self, where: str) -> None:
        """Raise where the index at ``where`` contradicts itself."""
        super().check(where)
        for shard in self.shards:
            if shard.samples != shard.rows:
                raise UsageError(
                    f"{where}: {shard.name} has {shard.rows} rows in {shard.samples} samples, expected equal"
                )


def write_image_index(
    folder: Path,
    shards: Sequence[Shard],
    facts: Sequence[NDArray[Any]],
    sources: Sequence[str],
    caption_key: str | None = None,
) -> ImageIndex:
    """Write ``facts.npy`` and then ``index.json``, whose presence says that the corpus is whole.

    Args:
        folder: Of the corpus.
        shards: Written, with their sidecars.
        facts: ``FACTS_DTYPE`` rows of each shard.
        sources: As asked for.
        caption_key: Key of the .json with the caption; by default it is the .txt.
    """
    index = image_index(folder, shards, facts, sources, caption_key)
    index.save(folder)
    return index


def image_index(
    folder: str | Path,
    shards: Sequence[Shard],
    facts: Sequence[NDArray[Any]],
    sources: Sequence[str],
    caption_key: str | None = None,
) -> ImageIndex:
    """Write ``facts.npy``; the index, to be saved last."""
    facts_sha256 = write_facts(folder, np.concatenate(facts))
    return ImageIndex(
        shards=tuple(shards),
        rows=sum(shard.rows for shard in shards),
        sources=tuple(sources),
        facts_sha256=facts_sha256,
        caption_key=caption_key or "",
    )


def write_facts(folder: str | Path, facts: NDArray[Any]) -> str:
    """Write ``facts.npy`` with ``FACTS_DTYPE`` rows into a folder or below a URL, and return its SHA-256."""
    content = io.BytesIO()
    np.lib.format.write_array(content, facts.astype(FACTS_DTYPE), version=(1, 0), allow_pickle=False)
    Target(str(folder)).write(FACTS_FILE, content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def read_facts(folder: str, index: ImageIndex) -> NDArray[Any]:
    """Facts of every row, ``FACTS_DTYPE`` of shape (rows,).

    Raises:
        UsageError: The file is missing or not the one that belongs to the index.
    """
    path = join(folder, FACTS_FILE)
    stored = open_bytes(path)
    content = stored.read(0, stored.size)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != index.facts_sha256:
        raise UsageError(f"{path}: SHA-256 is {sha256}, expected {index.facts_sha256}; index the shards again")
    header = io.BytesIO(content[:4096])
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype != FACTS_DTYPE or shape != (index.rows,):
        raise UsageError(f"{path}: holds {dtype} of shape {shape}; index the shards again")
    return np.frombuffer(content, dtype=FACTS_DTYPE, offset=header.tell())  # where the file is mapped, a view of it
