"""The index of a corpus of captioned images, and the facts next to it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...datamodules.corpora.images import FACTS_FILE, ImageIndex
from ...datamodules.corpora.index import Shard
from ...datamodules.imaging.facts import FACTS_DTYPE
from .destination import Target


def image_index(
    folder: str | Path,
    shards: Sequence[Shard],
    facts: Sequence[NDArray[Any]],
    sources: Sequence[str],
    caption_key: str | None = None,
    image_member: str = "",
    caption_member: str = "",
) -> ImageIndex:
    """Write ``facts.npy``; the index, to be saved last."""
    facts_sha256 = write_facts(folder, np.concatenate(facts))
    return ImageIndex(
        shards=tuple(shards),
        rows=sum(shard.rows for shard in shards),
        sources=tuple(sources),
        facts_sha256=facts_sha256,
        caption_key=caption_key or "",
        image_member=image_member,
        caption_member=caption_member,
    )


def write_facts(folder: str | Path, facts: NDArray[Any]) -> str:
    """Write ``facts.npy`` with ``FACTS_DTYPE`` rows into a folder or below a URL, and return its SHA-256."""
    content = io.BytesIO()
    np.lib.format.write_array(content, facts.astype(FACTS_DTYPE), version=(1, 0), allow_pickle=False)
    Target(str(folder)).write(FACTS_FILE, content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()
