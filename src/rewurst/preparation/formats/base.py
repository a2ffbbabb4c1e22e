"""Kinds of corpora: what a scan of shards looks for, and what of it can be checked later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...datamodules.corpora.index import CorpusIndex, Shard
from ...datamodules.corpora.tar import Sample
from ...datamodules.storage.random_access import Bytes


class Kind(ABC):
    """A kind of corpus; it goes to the processes that scan."""

    @abstractmethod
    def load(self, folder: str | Path) -> CorpusIndex:
        """Return the index of such a corpus."""

    @abstractmethod
    def offset(self, sample: Sample, where: str) -> int:
        """Where a sidecar says that a sample begins."""

    @abstractmethod
    def read(self, samples: Sequence[Sample], content: Bytes, where: str) -> Any:
        """Return what a scan finds in a shard."""

    @abstractmethod
    def rows(self, found: Any) -> int:
        """Rows in a shard."""

    @abstractmethod
    def index(
        self, folder: Path, shards: Sequence[Shard], found: Sequence[Any], sources: tuple[str, ...]
    ) -> CorpusIndex:
        """Return the index over all shards, to be saved; write what belongs next to it into ``folder``."""

    @abstractmethod
    def open(self, folder: str) -> Any:
        """Return the reader of the rows of such a corpus."""

    @abstractmethod
    def check_rows(self, opened: Any, rows: range) -> None:
        """Raise a ``UsageError`` if rows are not what the index says.

        Args:
            opened: By :meth:`open`.
            rows: Those of one shard.
        """

    def problems(self, folder: str, index: CorpusIndex) -> list[str]:
        """Return what is wrong with the files next to the shards, one line each."""
        return []

    def remarks(self, found: Sequence[Any]) -> str:
        """Return remarks on the shards for the user, as the end of a line."""
        return ""
