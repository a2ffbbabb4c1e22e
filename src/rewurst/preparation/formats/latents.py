"""Checks of a corpus of latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import UsageError
from ...datamodules.corpora.index import CorpusIndex, Shard
from ...datamodules.corpora.latents import LatentIndex, LatentShards
from ...datamodules.corpora.tar import Sample
from ...datamodules.imaging.header import DecodeError
from ...datamodules.storage.random_access import Bytes
from .base import Kind


class Latents(Kind):
    """Shards of latents, with the index that was written when they were made."""

    def load(self, folder: str | Path) -> LatentIndex:
        """Return the index of such a corpus."""
        return LatentIndex.load(folder)

    def offset(self, sample: Sample, where: str) -> int:
        """Return the offset of the first header of the sample."""
        return sample.begin

    def read(self, samples: Sequence[Sample], content: Bytes, where: str) -> Any:
        """Refuses: shards do not say which networks made them."""
        raise UsageError(f"{where}: latents without their index do not say what made them: copy the index.json too")

    def rows(self, found: Any) -> int:
        """Never asked for: nothing is found."""
        raise NotImplementedError

    def index(self, folder: Path, shards: Sequence[Shard], found: Sequence[Any], sources: tuple[str, ...]) -> Any:
        """Never asked for: nothing is found."""
        raise NotImplementedError

    def open(self, folder: str) -> LatentShards:
        """Return the reader of samples."""
        return LatentShards(folder)

    def check_rows(self, opened: LatentShards, rows: range) -> None:
        """Read every array."""
        for row in rows:
            members = opened.members(row)
            try:
                arrays = opened.arrays(members)
            except DecodeError as error:
                if "left_out" in json.loads(members.get("json", b"{}")):
                    continue
                raise UsageError(f"{opened.path}: {opened.locate(row)}: {error}") from None
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise UsageError(f"{opened.path}: {opened.locate(row)} has values that are not finite")

    def problems(self, folder: str, index: CorpusIndex) -> list[str]:
        """Whether the states of the empty text are there."""
        assert isinstance(index, LatentIndex)
        try:
            if "text" in index.what:
                LatentShards(folder).empty_text()
        except UsageError as error:
            return [str(error)]
        return []
