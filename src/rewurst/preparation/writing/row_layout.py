"""How a stream of tokens becomes rows, members and shards: the same for whoever writes them, and in whatever order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ...datamodules.corpora.index import Shard
from ...datamodules.corpora.tokens import TokenIndex

SHARD_BYTES = 256 * 2**20
ROWS_PER_SAMPLE = 256
UNPREDICTED = np.uint32(2**31)
"""Bit of a token in a stream with loss masks: the token is read, but not predicted."""


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Settings that decide the bytes of a corpus of tokens, besides its stream.

    Args:
        name: Beginning of the shards' names.
        sequence_length: Number of predicted tokens per row.
        vocab_size: Every token must be below it; decides between uint16 and uint32.
        end_token: Recorded in the index.
        tokenizer_sha256: Recorded in the index.
        sources: Recorded in the index.
        rows_per_sample: Rows of a tar member.
        rows_per_shard: A multiple of ``rows_per_sample``; by default shards have about 256 MiB.
        begin_tokens: Recorded in the index.
        masks: Whether rows have masks of the tokens that are to be predicted.

    Raises:
        UsageError: Numbers that fit no shard.
    """

    name: str
    sequence_length: int
    vocab_size: int
    end_token: int = 0
    tokenizer_sha256: str = ""
    sources: tuple[str, ...] = ()
    rows_per_sample: int = ROWS_PER_SAMPLE
    rows_per_shard: int | None = None
    begin_tokens: tuple[int, ...] = ()
    masks: bool = False

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise UsageError(f"sequence_length is {self.sequence_length}, expected 1 or more")
        if self.rows_per_sample < 1:
            raise UsageError(f"rows_per_sample is {self.rows_per_sample}, expected 1 or more")
        of, rows = self.rows_per_sample, self.rows_per_shard
        if rows is not None and (rows < 1 or rows % of):
            right = max(1, round(rows / of)) * of
            raise UsageError(f"rows_per_shard is {rows}, expected a multiple of {of} such as {right}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored tokens."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def stream_dtype(self) -> np.dtype[Any]:
        """Type of the tokens before they are packed, which with masks have room for one bit more."""
        return np.dtype("<u4") if self.masks else self.dtype

    def split(self, member: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return the tokens of a member, and which of them are to be predicted if rows have masks."""
        if not self.masks:
            return member, None
        return (member & ~UNPREDICTED).astype(self.dtype), (member & UNPREDICTED) == 0

    @property
    def samples_per_shard(self) -> int:
        """Members of every shard but the last."""
        if self.rows_per_shard is not None:
            return self.rows_per_shard // self.rows_per_sample
        sample_bytes = self.rows_per_sample * (self.sequence_length + 1) * self.dtype.itemsize
        return max(1, SHARD_BYTES // sample_bytes)

    @property
    def tokens_per_shard(self) -> int:
        """Predicted tokens of every shard but the last: shard i begins at token i times this."""
        return self.samples_per_shard * self.rows_per_sample * self.sequence_length

    def shard_name(self, number: int) -> str:
        """File name of a shard."""
        return f"{self.name}-{number:06d}.tar"

    def check(self, tokens: NDArray[np.integer[Any]]) -> None:
        """Raise where a token is outside the vocabulary."""
        if self.masks:
            tokens = tokens & ~UNPREDICTED
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            outside = tokens.min() if tokens.min() < 0 else tokens.max()
            raise UsageError(f"token {outside} is outside the vocabulary of {self.vocab_size}")

    def rows(self, tokens: int, where: str) -> int:
        """Rows that a stream of this many tokens fills.

        Raises:
            UsageError: None.
        """
        rows = max(0, tokens - 1) // self.sequence_length
        if not rows:
            raise UsageError(
                f"{where}: {tokens} tokens fill no row of {self.sequence_length + 1}; "
                "give more text or a smaller sequence_length"
            )
        return rows

    def index(self, shards: tuple[Shard, ...], stream_tokens: int, documents: int) -> TokenIndex:
        """Return the index of a corpus.

        Args:
            shards: All of them, in order.
            stream_tokens: Of the whole stream.
            documents: In the whole stream.
        """
        rows = sum(shard.rows for shard in shards)
        tokens = rows * self.sequence_length
        return TokenIndex(
            shards=shards,
            dtype=self.dtype.name,
            sequence_length=self.sequence_length,
            rows_per_sample=self.rows_per_sample,
            rows=rows,
            tokens=tokens,
            documents=documents,
            dropped_tokens=stream_tokens - 1 - tokens,
            vocab_size=self.vocab_size,
            end_token=self.end_token,
            tokenizer_sha256=self.tokenizer_sha256,
            sources=self.sources,
            begin_tokens=self.begin_tokens,
            masks=self.masks,
        )


def token_key(sample: int) -> str:
    """Key of a member, by its number in the corpus."""
    return f"{sample:06d}"


class MemberBuffer:
    """A stream of tokens into members; neighbouring rows share a token, so R rows of L + 1 are R * L + 1 tokens.

    Args:
        layout: Of the rows.
    """

    def __init__(self, layout: RowLayout) -> None:
        self._length = layout.sequence_length
        self._stream = np.empty(layout.rows_per_sample * self._length + 1, dtype=layout.stream_dtype)
        self._filled = 0

    def add(self, tokens: NDArray[np.integer[Any]]) -> Iterator[NDArray[Any]]:
        """Members that tokens, shape (n,), complete: each (rows_per_sample, sequence_length + 1), valid until the next.

        Args:
            tokens: The next ones of the stream, within the vocabulary.
        """
        position = 0
        while position < tokens.size:
            taken = min(tokens.size - position, self._stream.size - self._filled)
            self._stream[self._filled : self._filled + taken] = tokens[position : position + taken]
            self._filled += taken
            position += taken
            if self._filled == self._stream.size:
                yield self._member(self._filled)
                self._stream[0], self._filled = self._stream[-1], 1

    def rest(self) -> NDArray[Any] | None:
        """Return the last member, which has fewer rows; None if the rest fills no row."""
        rows = max(0, self._filled - 1) // self._length
        return self._member(rows * self._length + 1) if rows else None

    def _member(self, tokens: int) -> NDArray[Any]:
        windows = np.lib.stride_tricks.sliding_window_view(self._stream[:tokens], self._length + 1)
        member: NDArray[Any] = windows[:: self._length]
        return member
