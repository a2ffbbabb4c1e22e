"""Indexed reading of token shards: plain WebDataset tars, read by row number.

1. A corpus folder holds ``<name>-000000.tar``, ..., a sidecar ``<name>-000000.idx`` for each, and ``index.json``.
2. A tar member ``<key>.npy`` holds ``rows_per_sample`` rows of ``sequence_length + 1`` tokens; only the last member of
   the corpus may hold fewer, so that a row number gives its member by division.
3. A sidecar holds little-endian uint64: the byte offset of each member's header, then the offset where members end.
4. Row i + 1 begins with the last token of row i: every token of the stream but the first is predicted exactly once.

Shards are mapped into memory when they are first touched, and checked then: size, sidecar, and each member's header.
"""

from __future__ import annotations

import io
import mmap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import UsageError
from .corpus_index import CorpusIndex, Shard
from .packing import TokenWriter

__all__ = ["CorpusIndex", "MappedShard", "Shard", "TokenShards", "TokenWriter"]

TAR_BLOCK_BYTES = 512
OPEN_SHARDS = 128  # each map holds a file descriptor, of which a process often has 1,024


class TokenShards:
    """The rows of one prepared corpus, in any order; reads nothing but ``index.json`` until rows are asked for.

    It may be pickled and used after a fork: maps belong to the process that opened them.

    Args:
        folder: A folder that ``rewurst prepare text`` made (its ``train`` or ``val``).

    Raises:
        UsageError: No corpus there, or one that cannot be read (see ``CorpusIndex.load``).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.path = Path(folder), str(folder)
        self.index = CorpusIndex.load(folder)
        self.lanes = (self.index.rows,)
        self._first_sample = np.cumsum([0] + [shard.samples for shard in self.index.shards])
        self._mapped: OrderedDict[int, MappedShard] = OrderedDict()

    def __len__(self) -> int:
        return self.index.rows

    @property
    def tokenizer_folder(self) -> str:
        """The tokenizer's copy that lies with the corpus."""
        return str(self.folder / "tokenizer")

    def in_lane(self, lane: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers: there is one lane of all rows."""
        return index

    def read(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Read rows in the order asked for.

        Args:
            rows: Row numbers, shape (n,), each in [0, len(self)).

        Returns:
            Tokens, shape (n, sequence_length + 1).

        Raises:
            IndexError: A row that the corpus does not have.
            UsageError: A shard that is missing or is not what the index says.
        """
        shards, samples, within = self._places(np.asarray(rows))
        tokens = np.empty((len(within), self.index.sequence_length + 1), dtype=np.int64)
        for i, (shard, sample, row) in enumerate(zip(shards.tolist(), samples.tolist(), within.tolist(), strict=True)):
            tokens[i] = self._shard(shard).member(sample)[row]
        return tokens

    def locate(self, row: int) -> str:
        """Where a row lies, for messages: ``"code-000001.tar, member 000012.npy, row 17"``."""
        shards, samples, within = self._places(np.asarray([row]))
        shard, sample = int(shards[0]), int(samples[0])
        name = self._shard(shard).member_name(sample)
        return f"{self.index.shards[shard].name}, member {name}, row {int(within[0])}"

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which tokens come in which rows."""
        return self.index.fingerprint()

    def _places(self, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Shard, member within the shard and row within the member, each of shape (n,)."""
        if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
            raise IndexError(
                f"{self.folder}: rows have shape {rows.shape} and type {rows.dtype}, expected (n,) integers"
            )
        outside = rows[(rows < 0) | (rows >= len(self))]
        if outside.size:
            raise IndexError(
                f"{self.folder}: row {outside[0]} is out of range, the corpus has rows 0 to {len(self) - 1}"
            )
        samples, within = np.divmod(rows.astype(np.int64), self.index.rows_per_sample)
        shards = np.searchsorted(self._first_sample, samples, side="right") - 1
        return shards, samples - self._first_sample[shards], within

    def _shard(self, number: int) -> MappedShard:
        mapped = self._mapped.get(number)
        if mapped is None:
            first_row = int(self._first_sample[number]) * self.index.rows_per_sample
            mapped = self._mapped[number] = MappedShard(self.folder, self.index, self.index.shards[number], first_row)
            if len(self._mapped) > OPEN_SHARDS:
                self._mapped.popitem(last=False)
        else:
            self._mapped.move_to_end(number)
        return mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict()}


class MappedShard:
    """One tar in memory, its size and sidecar checked at once, each member's header when it is first used.

    Args:
        folder: Where the tar and its sidecar lie.
        index: The corpus.
        shard: The entry of this tar in the index.
        first_row: Row number of the shard's first row within the corpus.
    """

    def __init__(self, folder: Path, index: CorpusIndex, shard: Shard, first_row: int) -> None:
        self.path, self.shard = folder / shard.name, shard
        self._row_length, self._dtype = index.sequence_length + 1, np.dtype(index.dtype).newbyteorder("<")
        self._rows_per_sample, self._rows_from_here = index.rows_per_sample, index.rows - first_row
        self._members: dict[int, NDArray[Any]] = {}
        try:
            with self.path.open("rb") as file:
                self._check_size(file.seek(0, io.SEEK_END))
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read ({error.strerror}); the index lists it") from None
        self.offsets = self._read_offsets(folder / shard.idx_name)

    def member(self, sample: int) -> NDArray[Any]:
        """Tokens of one member, shape (rows, sequence_length + 1), a read-only view of the file."""
        view = self._members.get(sample)
        if view is None:
            view = self._members[sample] = self._view(sample)
        return view

    def member_name(self, sample: int) -> str:
        """Name of one member as the tar spells it."""
        start = int(self.offsets[sample])
        return self._bytes[start : start + 100].split(b"\0", 1)[0].decode("utf-8", "replace")

    def _check_size(self, size: int) -> None:
        if size != self.shard.bytes or not size:
            raise UsageError(f"{self.path}: {size} bytes found, {self.shard.bytes} expected; copy or prepare it again")

    def _read_offsets(self, path: Path) -> NDArray[np.uint64]:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror}); it belongs to {self.shard.name}") from None
        expected = 8 * (self.shard.samples + 1)
        if len(content) != expected:
            raise UsageError(
                f"{path}: {len(content)} bytes found, {expected} expected for {self.shard.samples} members"
            )
        offsets = np.frombuffer(content, dtype="<u8")
        if np.any(offsets[1:] <= offsets[:-1]) or offsets[-1] > self.shard.bytes:
            raise UsageError(f"{path}: offsets do not rise within the {self.shard.bytes} bytes of {self.shard.name}")
        return offsets

    def _view(self, sample: int) -> NDArray[Any]:
        start, end = int(self.offsets[sample]) + TAR_BLOCK_BYTES, int(self.offsets[sample + 1])
        rows = min(self._rows_per_sample, self._rows_from_here - sample * self._rows_per_sample)
        expected = f"{self._dtype.name} rows of shape ({rows}, {self._row_length}) in C order"
        header = io.BytesIO(self._bytes[start : min(end, start + 4096)])
        try:
            # Only the header is parsed, as literals: a pickled array is refused before anything of it is loaded.
            if np.lib.format.read_magic(header) != (1, 0):
                raise ValueError("npy version is not 1.0")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{self.path}: no npy header at byte {start} ({reason}); expected {expected}") from None
        begin = start + header.tell()
        if shape != (rows, self._row_length) or dtype != self._dtype or (fortran_order and min(shape) > 1):
            order = "Fortran" if fortran_order else "C"
            found = f"{dtype.name} of shape {shape} in {order} order"
            raise UsageError(
                f"{self.path}: member at byte {start - TAR_BLOCK_BYTES} holds {found}, expected {expected}"
            )
        if begin + rows * self._row_length * self._dtype.itemsize > end:
            raise UsageError(f"{self.path}: member at byte {start - TAR_BLOCK_BYTES} ends before its rows do")
        return np.ndarray((rows, self._row_length), dtype=self._dtype, buffer=self._bytes, offset=begin)
