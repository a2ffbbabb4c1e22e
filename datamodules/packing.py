"""A stream of tokens packed into rows, rows into tar members, members into shards."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import UsageError
from .corpus_index import INDEX_FILE, Shard, writing
from .shard_file import ShardFile
from .token_index import TokenIndex

SHARD_BYTES = 256 * 2**20
ROWS_PER_SAMPLE = 256


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
        if sequence_length < 1:
            raise UsageError(f"sequence_length is {sequence_length}, expected 1 or more")
        if rows_per_sample < 1:
            raise UsageError(f"rows_per_sample is {rows_per_sample}, expected 1 or more")
        if rows_per_shard is not None and (rows_per_shard < 1 or rows_per_shard % rows_per_sample):
            right = max(1, round(rows_per_shard / rows_per_sample)) * rows_per_sample
            raise UsageError(
                f"rows_per_shard is {rows_per_shard}, expected a multiple of {rows_per_sample} such as {right}"
            )
        self.folder, self.name = Path(folder), name
        self.sequence_length, self.rows_per_sample = sequence_length, rows_per_sample
        self.vocab_size, self.end_token = vocab_size, end_token
        self.tokenizer_sha256, self.sources = tokenizer_sha256, sources
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        sample_bytes = rows_per_sample * (sequence_length + 1) * self.dtype.itemsize
        self._samples_per_shard = max(1, SHARD_BYTES // sample_bytes)
        if rows_per_shard is not None:
            self._samples_per_shard = rows_per_shard // rows_per_sample
        # One member's worth of stream: neighbouring rows share a token, so R rows of L + 1 are R * L + 1 tokens.
        self._stream = np.empty(rows_per_sample * sequence_length + 1, dtype=self.dtype)
        self._filled = 0
        self.tokens_appended = 0
        self.documents = 0
        self._shards: list[Shard] = []
        self._open: ShardFile | None = None

    def append(self, tokens: NDArray[np.integer[Any]], documents: int = 0) -> None:
        """Add ``tokens``, shape (n,), to the stream, and ``documents`` to the count of documents."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
            raise UsageError(f"tokens have shape {tokens.shape} and type {tokens.dtype}, expected (n,) integers")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            outside = tokens.min() if tokens.min() < 0 else tokens.max()
            raise UsageError(f"token {outside} is outside the vocabulary of {self.vocab_size}")
        self.documents += documents
        self.tokens_appended += tokens.size
        position = 0
        while position < tokens.size:
            taken = min(tokens.size - position, self._stream.size - self._filled)
            self._stream[self._filled : self._filled + taken] = tokens[position : position + taken]
            self._filled += taken
            position += taken
            if self._filled == self._stream.size:
                self._write_member(self.rows_per_sample)

    def close(self) -> TokenIndex:
        """Write the last member and ``index.json``; the tail that fills no row is dropped and counted.

        Raises:
            UsageError: The stream is shorter than one row.
        """
        rows = max(0, self._filled - 1) // self.sequence_length
        if rows:
            self._write_member(rows)
        if self._open is not None:
            self._close_shard(self._open)
        total_rows = sum(shard.rows for shard in self._shards)
        if not total_rows:
            raise UsageError(
                f"{self.folder}: {self.tokens_appended} tokens fill no row of {self.sequence_length + 1}; "
                "give more text or a smaller sequence_length"
            )
        tokens = total_rows * self.sequence_length
        index = TokenIndex(
            shards=tuple(self._shards),
            dtype=self.dtype.name,
            sequence_length=self.sequence_length,
            rows_per_sample=self.rows_per_sample,
            rows=total_rows,
            tokens=tokens,
            documents=self.documents,
            dropped_tokens=self.tokens_appended - 1 - tokens,
            vocab_size=self.vocab_size,
            end_token=self.end_token,
            tokenizer_sha256=self.tokenizer_sha256,
            sources=self.sources,
        )
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

    def _write_member(self, rows: int) -> None:
        used = rows * self.sequence_length
        stream = self._stream[: used + 1]
        members = np.lib.stride_tricks.sliding_window_view(stream, self.sequence_length + 1)[:: self.sequence_length]
        if self._open is None:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._open = ShardFile(self.folder / f"{self.name}-{len(self._shards):06d}.tar")
        # Keys count through the corpus: webdataset merges neighbouring samples of one key, across shards too.
        sample = sum(shard.samples for shard in self._shards) + self._open.samples
        self._open.add(f"{sample:06d}", members)
        self._stream[0] = stream[-1]
        self._filled = 1
        if self._open.samples == self._samples_per_shard:
            self._close_shard(self._open)

    def _close_shard(self, shard: ShardFile) -> None:
        self._shards.append(shard.close())
        self._open = None
