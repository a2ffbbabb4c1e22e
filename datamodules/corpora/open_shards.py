"""Open shards of a corpus: the bytes of a tar and the offsets of its samples, checked on first access."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ..storage.random_access import join as join_path
from ..storage.random_access import open_bytes, read_whole
from .index import CorpusIndex, Shard

MAX_OPEN = 128  # processes often may open only 1,024 files, and each map takes address space


class OpenShard:
    """One tar and its sidecar.

    Args:
        folder: Path or URL of the folder that contains the index.
        shard: Entry of the tar in the index.
    """

    def __init__(self, folder: str, shard: Shard) -> None:
        self.shard = shard
        self.where = shard_path(folder, shard)
        try:
            self.content = open_bytes(self.where)
        except UsageError as error:
            raise UsageError(f"{error}; {join_path(folder, 'index.json')} lists it") from None
        if self.content.size != shard.bytes or not shard.bytes:
            raise UsageError(
                f"{self.where}: {self.content.size} bytes found, {shard.bytes} expected; copy or prepare it again"
            )
        self.idx = join_path(folder, shard.idx_name)
        self.offsets = self._read_offsets()

    def sample(self, number: int) -> memoryview:
        """Return the bytes of a sample, from its first header to the next sample's."""
        return self.content.read(int(self.offsets[number]), int(self.offsets[number + 1]))

    def member_name(self, number: int) -> str:
        """Return the name of a sample's first member, as written in the tar."""
        start = int(self.offsets[number])
        return bytes(self.content.read(start, start + 100)).split(b"\0", 1)[0].decode("utf-8", "replace")

    def _read_offsets(self) -> NDArray[np.uint64]:
        try:
            content = read_whole(self.idx)
        except FileNotFoundError:
            raise UsageError(f"{self.idx}: missing; copy it next to {self.shard.name} or index again") from None
        expected = 8 * (self.shard.samples + 1)
        if len(content) != expected:
            raise UsageError(
                f"{self.idx}: {len(content)} bytes found, {expected} expected for {self.shard.samples} members"
            )
        offsets = np.frombuffer(content, dtype="<u8")
        if np.any(offsets[1:] <= offsets[:-1]) or offsets[-1] > self.shard.bytes:
            raise UsageError(
                f"{self.idx}: offsets do not increase within the {self.shard.bytes} bytes of {self.shard.name}"
            )
        return offsets


S = TypeVar("S", bound=OpenShard)


class Shards(Generic[S]):
    """Shards of a corpus by number; the most recently used ones are kept open.

    Instances can be pickled and used after a fork: open files belong to the process that opened them.

    Args:
        kind: Function that opens a shard, given the folder and the shard's entry.
        folder: Path or URL of the folder that contains the index.
        index: Index of the corpus.
    """

    def __init__(self, kind: Callable[[str, Shard], S], folder: str, index: CorpusIndex) -> None:
        self.kind, self.folder, self.index = kind, folder, index
        self._open: OrderedDict[int, S] = OrderedDict()

    def __getitem__(self, number: int) -> S:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = self.kind(self.folder, self.index.shards[number])
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def shard_path(folder: str, shard: Shard) -> str:
    """Return the path of a shard: the URL in the index, or its name next to the index."""
    return shard.url or join_path(folder, shard.name)


def places(ends: NDArray[np.int64], rows: NDArray[Any], where: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the shard of each row and the row's number within it, each ``(n,)``.

    Args:
        ends: Rows of the corpus up to and including each shard, ``(shards,)``.
        rows: Row numbers, ``(n,)``.
        where: Name of the corpus for messages.

    Raises:
        IndexError: The corpus does not have one of these rows.
    """
    if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
        raise IndexError(f"{where}: rows have shape {rows.shape} and type {rows.dtype}, expected (n,) integers")
    outside = rows[(rows < 0) | (rows >= ends[-1])]
    if outside.size:
        raise IndexError(f"{where}: row {outside[0]} is out of range, the corpus has rows 0 to {ends[-1] - 1}")
    shards = np.searchsorted(ends, rows, side="right")
    return shards, rows - np.concatenate([[0], ends[:-1]])[shards]


def ends_of(shards: Sequence[Shard]) -> NDArray[np.int64]:
    """Return the number of rows up to and including each shard, ``(shards,)``."""
    return np.cumsum([shard.rows for shard in shards], dtype=np.int64)
