"""A corpus that is read from front to back: tars that somebody else wrote, without an index.

1. Each reader (a worker of a process) has tars of its own, in an order that its seed and the pass decide.
2. Samples are shuffled within blocks of a tar, so that a place is a pass, a tar and a number of samples.
3. A micro-batch says after reading where its reader is; a resume opens the tar and skips what was taken from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from .order import Place, ShardOrder
from .tars import is_pipe

UNKNOWN_ROWS = 2**40  # a stream has no end

T = TypeVar("T")
Rows = NDArray[np.int64]


def expand_tars(sources: str | Sequence[str], allow_pipe: bool) -> list[str]:
    """Return the tars that a stream names; braces in paths and URLs are expanded.

    Raises:
        UsageError: A command that is not allowed, or no tar.
    """
    from braceexpand import braceexpand

    found: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        if is_pipe(source) and not allow_pipe:
            raise UsageError(f"{source}: runs a command; set allow_pipe: true if you trust its origin")
        if not is_pipe(source) and Path(source).is_dir():
            found += sorted(str(path) for path in Path(source).glob("*.tar*"))
        else:
            found += braceexpand(source)
    if not found:
        raise UsageError(f"stream {sources}: names no tar")
    return found


class Stream(ABC, Generic[T]):
    """Samples in sequence; a subclass says what a sample is.

    Args:
        name: Name of the corpus.
        path: What the corpus was asked for as, for messages.
        urls: Tars.
    """

    streamed = True
    buckets = (UNKNOWN_ROWS,)

    def __init__(self, name: str, path: str, urls: Sequence[str]) -> None:
        self.name, self.path, self.urls = name, path, tuple(urls)
        self._readers: dict[int, _Reader[T]] = {}
        self._worker = 0

    def __len__(self) -> int:
        return UNKNOWN_ROWS

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    @abstractmethod
    def open(self, url: str, epoch: int) -> Iterator[T]:
        """Yield the samples of a tar in the order of a pass."""

    def in_bucket(self, bucket: int, index: Rows) -> Rows:
        """Return counters: samples have no numbers."""
        return index

    def locate(self, row: int) -> str:
        """Return the place of a sample, for messages."""
        return f"sample {row} of a stream"

    def deal(self, process: int, order: ShardOrder, begin: int, places: Sequence[Place]) -> None:
        """Give this process its readers, one per worker.

        Args:
            process: Number of this process.
            order: Order of all tars.
            begin: Number of the first micro-batch.
            places: Place of each worker's reader.
        """
        self._process, self._order, self._begin, self._places = process, order, begin, list(places)
        self._readers = {}

    def seek(self, number: int) -> None:
        """Choose the reader of a micro-batch; those of a worker come in order.

        Raises:
            UsageError: A micro-batch came out of order, so that rows would be lost.
        """
        workers = len(self._places)
        worker = self._worker = number % workers
        reader = self._readers.get(worker)
        if reader is None:
            first = self._begin + (worker - self._begin) % workers
            index = self._process * workers + worker
            reader = self._readers[worker] = _Reader(self._order, index, self._places[worker], self.open, first)
        if number != reader.number:
            raise UsageError(f"corpus {self.name!r}: micro-batch {number} came where {reader.number} was due")
        reader.number += workers

    def place(self) -> tuple[int, int, int, int]:
        """Return the worker of the latest micro-batch, and where its reader is after it."""
        return (self._worker, *self._readers[self._worker].place)

    def next(self) -> T:
        """Return the next sample of the reader that :meth:`seek` has chosen."""
        return self._readers[self._worker].next()


class _Reader(Generic[T]):
    """One worker's rows, tar after tar, pass after pass."""

    def __init__(
        self,
        order: ShardOrder,
        index: int,
        place: Place,
        read: Callable[[str, int], Iterator[T]],
        number: int,
    ) -> None:
        self.place, self.number = place, number
        self._order, self._index, self._read = order, index, read
        self._rows: Iterator[T] | None = None
        self._taken = 1  # of this pass; a place within one says that there were rows

    def next(self) -> T:
        """Return the next sample."""
        while True:
            if self._rows is None:
                self._rows = self._next_tar()
            for sample in self._rows:
                self.place = self.place._replace(row=self.place.row + 1)
                self._taken += 1
                return sample
            self.place, self._rows = Place(self.place.epoch, self.place.shard + 1, 0), None

    def _next_tar(self) -> Iterator[T]:
        own = self._order.own(self._index, self.place.epoch)
        if self.place.shard >= len(own):
            if not self._taken:
                raise UsageError(f"corpus {self._order.corpus!r}: no row in {', '.join(own[:3])}")
            self.place, self._taken = Place(self.place.epoch + 1, 0, 0), 0
            own = self._order.own(self._index, self.place.epoch)
        return islice(self._read(own[self.place.shard], self.place.epoch), self.place.row, None)
