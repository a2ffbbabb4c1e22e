"""A stream of tokens packed into rows, rows into tar members, members into shards."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ...datamodules.corpora.index import INDEX_FILE, Shard
from ...datamodules.corpora.tokens import TokenIndex
from ...files import writing
from .row_layout import MemberBuffer, RowLayout, token_key
from .shard_file import ShardFile


class TokenWriter:
    """Writes a corpus folder from a stream of tokens that comes in pieces of any length.

    As a context manager it deletes what it has written when the block fails. The same stream gives the same bytes,
    however it is cut into pieces.

    Args:
        folder: Folder to write; it is made with the first shard.
        layout: Fields of :class:`RowLayout`.

    Raises:
        UsageError: Numbers that fit no shard, tokens outside the vocabulary, or a stream shorter than one row.
    """

    def __init__(self, folder: str | Path, **layout: Any) -> None:
        self.folder, self.layout = Path(folder), RowLayout(**layout)
        self._members = MemberBuffer(self.layout)
        self.tokens_appended = 0
        self.documents = 0
        self._shards: list[Shard] = []
        self._open: ShardFile | None = None

    def append(self, tokens: NDArray[np.integer[Any]], documents: int = 0) -> None:
        """Add ``tokens``, shape (n,), to the stream, and ``documents`` to the count of documents."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
            raise UsageError(f"tokens have shape {tokens.shape} and type {tokens.dtype}, expected (n,) integers")
        self.layout.check(tokens)
        self.documents += documents
        self.tokens_appended += tokens.size
        for member in self._members.add(tokens):
            self._write(member)

    def close(self) -> TokenIndex:
        """Write the last member and ``index.json``; the tail that fills no row is dropped and counted.

        Raises:
            UsageError: The stream is shorter than one row.
        """
        self.layout.rows(self.tokens_appended, str(self.folder))
        if (rest := self._members.rest()) is not None:
            self._write(rest)
        if self._open is not None:
            self._close_shard(self._open)
        index = self.layout.index(tuple(self._shards), self.tokens_appended, self.documents)
        index.save(self.folder)
        return index

    def abort(self) -> None:
        """Delete the shards and the index that this writer has written."""
        (self.folder / INDEX_FILE).unlink(missing_ok=True)
        if self._open is not None:
            self._open.discard()
            self._open = None
        for shard in self._shards:
            (self.folder / shard.name).unlink(missing_ok=True)
            (self.folder / shard.idx_name).unlink(missing_ok=True)
        self._shards.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()

    def _write(self, member: NDArray[Any]) -> None:
        if self._open is None:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._open = ShardFile(self.folder / self.layout.shard_name(len(self._shards)))
        # Keys count through the corpus: webdataset merges neighbouring samples of one key, across shards too.
        sample = sum(shard.samples for shard in self._shards) + self._open.samples
        self._open.add(token_key(sample), *self.layout.split(member))
        if self._open.samples == self.layout.samples_per_shard:
            self._close_shard(self._open)

    def _close_shard(self, shard: ShardFile) -> None:
        self._shards.append(shard.close())
        self._open = None
