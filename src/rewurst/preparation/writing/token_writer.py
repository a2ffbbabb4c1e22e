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
from .row_layout import ROWS_PER_SAMPLE, MemberBuffer, RowLayout, token_key
from .shard_file import ShardFile


class TokenWriter:
    """Writes a corpus folder from a stream of tokens that comes in pieces of any length.

    As a context manager it deletes what it has written when the block fails. The same stream gives the same bytes,
    however it is cut into pieces.

    Args:
        folder: Made with the first shard if it does not exist.
        name: Beginning of the shards' names.
        sequence_length: Predicted tokens a row.
        vocab_size: Every token must be below it; decides between uint16 and uint32.
        end_token: Recorded in the index.
        tokenizer_sha256: Recorded in the index.
        sources: Recorded in the index.
        rows_per_sample: Rows of a tar member.
        rows_per_shard: A multiple of ``rows_per_sample``; by default shards have about 256 MiB.

    Raises:
        UsageError: Numbers that fit no shard, tokens outside the vocabulary, a stream shorter than one row.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str,
        sequence_length: int,
        vocab_size: int,
        end_token: int = 0,
        tokenizer_sha256: str = "",
        sources: tuple[str, ...] = (),
        rows_per_sample: int = ROWS_PER_SAMPLE,
        rows_per_shard: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.layout = RowLayout(
            name=name,
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            end_token=end_token,
            tokenizer_sha256=tokenizer_sha256,
            sources=sources,
            rows_per_sample=rows_per_sample,
            rows_per_shard=rows_per_shard,
        )
        self._members = MemberBuffer(self.layout)
        self.tokens_appended = 0
        self.documents = 0
        self._shards: list[Shard] = []
        self._open: ShardFile | None = None

    @classmethod
    def with_layout(cls, folder: str | Path, layout: RowLayout) -> Self:
        """A writer of shards of this layout."""
        return cls(folder, **vars(layout))

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
        self._open.add(token_key(sample), member)
        if self._open.samples == self.layout.samples_per_shard:
            self._close_shard(self._open)

    def _close_shard(self, shard: ShardFile) -> None:
        self._shards.append(shard.close())
        self._open = None
