"""Read token shards, which are plain WebDataset tars, by row number.

1. A corpus folder contains ``<name>-000000.tar``, ..., a sidecar ``<name>-000000.idx`` for each, and ``index.json``.
2. A tar member ``<key>.npy`` has ``rows_per_sample`` rows of ``sequence_length + 1`` tokens; only the last member of
   a shard may have fewer, so that dividing a row number gives its member.
3. A sidecar contains little-endian uint64: the byte offset of each member's header, then the end of the last one.
4. Row i + 1 begins with the last token of row i: every token of the stream but the first is predicted exactly once.

Local shards are mapped into memory; remote ones are read in ranges. Their size, sidecar and member headers are
checked on first access.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ..storage.random_access import is_remote, read_whole
from .index import ABSENT_IF_EMPTY, CorpusIndex, Shard, read_index
from .open_shards import OpenShard, Shards, ends_of, places
from .tar import BLOCK_BYTES

HEADER_BYTES = 4096  # more than the header of any array of numbers
DTYPES = ("uint16", "uint32", "int32", "int64")


@dataclass(frozen=True, kw_only=True)
class TokenIndex(CorpusIndex):
    """The contents of ``index.json``; ``rows`` of a shard counts rows and ``samples`` counts tar members.

    Attributes:
        dtype: ``uint16`` for vocabularies of up to 65,536 tokens, else ``uint32``; foreign shards may have others.
        sequence_length: Number of predicted tokens per row; a row has one token more.
        rows_per_sample: Number of rows per tar member; the last member of a shard may have fewer.
        tokens: Number of predicted tokens, ``rows * sequence_length``.
        documents: Number of documents in the stream, including the dropped tail; 0 if unknown.
        dropped_tokens: Number of tokens at the end of the stream that did not fill a row.
        vocab_size: Size of the vocabulary; every token is smaller.
        end_token: Token after each document; None if unknown.
        tokenizer_sha256: SHA-256 of the ``tokenizer.json`` that made the tokens; empty if unknown.
        masks: Whether each member is followed by ``<key>.mask.npy`` of the same shape, which is false for tokens that
            are not predicted.
        begin_tokens: Tokens before each document, such as a BOS; empty in corpora prepared before they were recorded.
    """

    dtype: str
    sequence_length: int
    rows_per_sample: int
    tokens: int
    documents: int
    dropped_tokens: int
    vocab_size: int
    end_token: int | None
    tokenizer_sha256: str
    begin_tokens: tuple[int, ...] = field(default=(), metadata=ABSENT_IF_EMPTY)
    masks: bool = field(default=False, metadata=ABSENT_IF_EMPTY)
    kind: str = "text"

    def check(self, where: str) -> None:
        """Raise ``UsageError`` if the index at ``where`` contradicts itself."""
        super().check(where)
        if self.dtype not in DTYPES:
            raise UsageError(f"{where}: dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        expected = {
            "sequence_length": max(1, self.sequence_length),
            "rows_per_sample": max(1, self.rows_per_sample),
            "tokens": self.rows * self.sequence_length,
        }
        for name, right in expected.items():
            if (value := getattr(self, name)) != right:
                raise UsageError(f"{where}: {name} is {value}, expected {right}; prepare the corpus again")
        for shard in self.shards:
            if shard.samples != -(-shard.rows // self.rows_per_sample):
                raise UsageError(
                    f"{where}: {shard.name} has {shard.rows} rows in {shard.samples} members, expected "
                    f"{self.rows_per_sample} in each member but the last; prepare the corpus again"
                )

    @classmethod
    def not_in_fingerprint(cls) -> tuple[str, ...]:
        """Return the names of counts that follow from the shards or do not affect the rows."""
        return ("tokens", "documents", "dropped_tokens", "begin_tokens", "masks")


class TokenShards:
    """Random access to the rows of one prepared corpus; only ``index.json`` is read until rows are requested.

    Instances can be pickled and used after a fork.

    Args:
        folder: Folder made by ``rewurst prepare`` (such as its ``train`` or ``val``), or its URL.

    Raises:
        UsageError: There is no corpus, or it cannot be read (see ``TokenIndex.load``).
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = str(folder)
        self.index, kind = _opened(folder)
        self.buckets = (self.index.rows,)
        self._signed = self.index.dtype.startswith("int")
        self._ends = ends_of(self.index.shards)
        self._shards: Shards[Any] = Shards(partial(kind, self.index), self.path, self.index)

    def __len__(self) -> int:
        return self.index.rows

    @property
    def tokenizer_folder(self) -> str:
        """Folder of the tokenizer that is stored with the corpus."""
        return f"{self.path.rstrip('/')}/tokenizer"

    def has_tokenizer_of(self, other: Any) -> bool:
        """Return whether both corpora's tokenizers are equivalent; library versions write different bytes."""
        if self.index.tokenizer_sha256 == other.index.tokenizer_sha256:
            return True
        if not self.index.tokenizer_sha256 or not other.index.tokenizer_sha256:
            return False
        from ...tokenizer_meaning import same_tokenizer

        try:
            return same_tokenizer(self.read_tokenizer(), other.read_tokenizer())
        except FileNotFoundError:
            return False

    def read_tokenizer(self) -> str:
        """Return the ``tokenizer.json`` stored next to the shards.

        Raises:
            FileNotFoundError: The corpus has no tokenizer.
        """
        return bytes(read_whole(f"{self.tokenizer_folder}/tokenizer.json")).decode("utf-8", "replace")

    def in_bucket(self, bucket: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ``index`` itself: all rows are in one bucket."""
        return index

    def read(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """Return rows in the order given.

        Args:
            rows: Row numbers, shape (n,), each in [0, len(self)).

        Returns:
            Tokens of the corpus's dtype, shape (n, sequence_length + 1).

        Raises:
            IndexError: The corpus does not have one of these rows.
            UsageError: A shard is missing or does not match the index, or a token is beyond the vocabulary.
        """
        rows = np.asarray(rows)
        tokens = np.empty((rows.size, self.index.sequence_length + 1), dtype=self.index.dtype)
        self.read_into(tokens, range(rows.size), rows)
        if tokens.size and (tokens.max() >= self.index.vocab_size or (self._signed and tokens.min() < 0)):
            self.refuse(rows, tokens)
        return tokens

    def read_into(self, tokens: NDArray[Any], slots: Iterable[int], rows: NDArray[np.integer[Any]]) -> None:
        """Read rows into these slots of ``tokens`` without checking their values."""
        shards, within = places(self._ends, rows, self.path)
        for slot, shard, row in zip(slots, shards.tolist(), within.tolist(), strict=True):
            tokens[slot] = self._shards[shard].row(row)

    def read_masks(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Return which tokens of rows are predicted, (n, sequence_length + 1): all if the corpus has no masks."""
        rows = np.asarray(rows)
        masks = np.ones((rows.size, self.index.sequence_length + 1), dtype=np.bool_)
        if self.index.masks:
            shards, within = places(self._ends, rows, self.path)
            for slot, (shard, row) in enumerate(zip(shards.tolist(), within.tolist(), strict=True)):
                masks[slot] = self._shards[shard].mask(row)
        return masks

    def locate(self, row: int) -> str:
        """Return the place of a row for messages: ``"code-000001.tar, member 000012.npy, row 17"``."""
        shards, within = places(self._ends, np.asarray([row]), self.path)
        shard = self._shards[int(shards[0])]
        return f"{shard.shard.name}, {shard.place(int(within[0]))}"

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides which tokens are in which rows."""
        return self.index.fingerprint()

    def refuse(self, rows: NDArray[Any], tokens: NDArray[Any]) -> None:
        """Raise ``UsageError`` naming the first of these rows that contains a token beyond the vocabulary."""
        first = int(((tokens < 0) | (tokens >= self.index.vocab_size)).any(1).argmax())
        token = tokens[first].min() if tokens[first].min() < 0 else tokens[first].max()
        raise UsageError(
            f"{self.path}: {self.locate(int(rows[first]))} contains token {token}, but the vocabulary has "
            f"{self.index.vocab_size} tokens; check the corpus with `rewurst prepare verify`"
        )


def _opened(folder: str | Path) -> tuple[TokenIndex, Callable[..., Any]]:
    """Return the index of a corpus of tokens, and what opens one of its files."""
    from .flat_tokens import FlatFile, FlatIndex

    if read_index(folder)[1].get("kind") == "flat":
        return FlatIndex.load(folder), FlatFile
    return TokenIndex.load(folder), TokenShard


class TokenShard(OpenShard):
    """One tar of rows.

    Args:
        index: Index of the corpus.
        folder: Path or URL of the folder that contains the index.
        shard: Entry of the tar in the index.
    """

    def __init__(self, index: TokenIndex, folder: str, shard: Shard) -> None:
        super().__init__(folder, shard)
        self._row_length, self._dtype = index.sequence_length + 1, np.dtype(index.dtype).newbyteorder("<")
        self._row_bytes = self._row_length * self._dtype.itemsize
        self._rows_per_sample = index.rows_per_sample
        self._ranged = is_remote(self.where)  # fetch only the row, not a member of many rows
        self._members: dict[int, NDArray[Any]] = {}
        self._begins: dict[int, int] = {}
        self._mask_begins: dict[int, int] = {}

    def row(self, number: int) -> NDArray[Any]:
        """Return the tokens of one row of the shard, shape (sequence_length + 1,)."""
        sample, row = divmod(number, self._rows_per_sample)
        if self._ranged:
            begin = self._begin(sample) + row * self._row_bytes
            return np.frombuffer(self.content.read(begin, begin + self._row_bytes), dtype=self._dtype)
        view = self._members.get(sample)
        if view is None:
            view = self._members[sample] = self.member(sample)
        found: NDArray[Any] = view[row]
        return found

    def place(self, number: int) -> str:
        """Return the place of a row of the shard, for messages."""
        sample, inside = divmod(number, self._rows_per_sample)
        return f"member {self.member_name(sample)}, row {inside}"

    def mask(self, number: int) -> NDArray[np.bool_]:
        """Return which tokens of a row of the shard are predicted, shape (sequence_length + 1,)."""
        sample, row = divmod(number, self._rows_per_sample)
        begin = self._mask_begins.get(sample)
        if begin is None:
            begin = self._mask_begins[sample] = self._checked_mask(sample)
        begin += row * self._row_length
        return np.frombuffer(self.content.read(begin, begin + self._row_length), dtype=np.bool_)

    def _checked_mask(self, sample: int) -> int:
        """Return the offset of the mask of a member's first row; its member follows that of the tokens."""
        end_of_tokens = self._begin(sample) + self._rows_in(sample) * self._row_bytes
        start = -(-end_of_tokens // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES
        end, shape = int(self.offsets[sample + 1]), (self._rows_in(sample), self._row_length)
        try:
            header = read_header(self.content.read(start, min(start + HEADER_BYTES, end)))
        except ValueError:
            header = None
        if header is None or header.shape != shape or header.dtype != np.bool_ or start + header.end > end:
            raise UsageError(f"{self.where}: no mask.npy of booleans of shape {shape} at byte {start - BLOCK_BYTES}")
        return start + header.begin

    def member(self, sample: int) -> NDArray[Any]:
        """Return the tokens of one member, shape (rows, sequence_length + 1); a read-only view if the tar is mapped."""
        begin, rows = self._begin(sample), self._rows_in(sample)
        content = self.content.read(begin, begin + rows * self._row_bytes)
        return np.frombuffer(content, dtype=self._dtype).reshape(rows, self._row_length)

    def _rows_in(self, sample: int) -> int:
        return min(self._rows_per_sample, self.shard.rows - sample * self._rows_per_sample)

    def _begin(self, sample: int) -> int:
        """Return the offset of a member's first row; check its header the first time."""
        begin = self._begins.get(sample)
        if begin is None:
            begin = self._begins[sample] = self._checked(sample)
        return begin

    def _checked(self, sample: int) -> int:
        start, end = int(self.offsets[sample]) + BLOCK_BYTES, int(self.offsets[sample + 1])
        rows = self._rows_in(sample)
        expected = f"{self._dtype.name} rows of shape ({rows}, {self._row_length}) in C order"
        try:
            header = read_header(self.content.read(start, min(start + HEADER_BYTES, end)))
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{self.where}: no npy header at byte {start} ({reason}); expected {expected}") from None
        member = f"{self.where}: member at byte {start - BLOCK_BYTES}"
        if header.shape != (rows, self._row_length) or header.dtype != self._dtype or header.fortran_order:
            order = "Fortran" if header.fortran_order else "C"
            found = f"{header.dtype.name} of shape {header.shape} in {order} order"
            raise UsageError(f"{member} contains {found}, expected {expected}")
        if start + header.end > end:
            raise UsageError(f"{member} ends before its rows do")
        return start + header.begin


class RowsHeader(NamedTuple):
    """Header of a ``.npy`` member.

    Attributes:
        begin: Offset of the first row in the member, in bytes.
        shape: (rows, sequence_length + 1); an array of one dimension is one row.
        dtype: Data type of the tokens.
        fortran_order: Whether the array is stored column by column.
    """

    begin: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool

    @property
    def end(self) -> int:
        """Offset after the last row, in bytes."""
        return self.begin + int(np.prod(self.shape)) * self.dtype.itemsize


def read_header(content: memoryview) -> RowsHeader:
    """Return the header of a ``.npy`` member, read from its first ``HEADER_BYTES``.

    Raises:
        ValueError: The header is not valid. Only literals are parsed, so a pickled array is never loaded.
    """
    header = io.BytesIO(content)
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError("npy version is not 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
    shape = (1, *shape) if len(shape) == 1 else shape
    return RowsHeader(header.tell(), shape, dtype, fortran_order and min(shape, default=0) > 1)
