"""Order of the tars that a reader opens: a pure function of the seed, the pass over them, and the reader's number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from ... import UsageError
from ..sampling.permutation import permute, round_keys

T = TypeVar("T")


class Place(NamedTuple):
    """Where a reader is.

    Attributes:
        epoch: Number of complete passes over the reader's tars.
        shard: Number of tars read completely in this pass.
        row: Number of rows taken from the current tar.
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0


@dataclass(frozen=True)
class ShardOrder:
    """Order of tars over passes, and the part of each reader.

    Args:
        corpus: Name of the corpus; with the seed it decides the order.
        urls: Tars.
        seed: Seed of the run.
        readers: Number of readers: processes times workers.

    Raises:
        UsageError: Fewer tars than readers.
    """

    corpus: str
    urls: tuple[str, ...]
    seed: int
    readers: int

    def __post_init__(self) -> None:
        if len(self.urls) < self.readers:
            raise UsageError(
                f"corpus {self.corpus!r}: {len(self.urls)} tars for {self.readers} readers (processes times workers); "
                "each needs one of its own: use fewer workers, or more and smaller tars"
            )

    def own(self, reader: int, epoch: int) -> list[str]:
        """Return the tars of a reader in a pass, in their order."""
        keys = round_keys(self.seed, self.corpus, epoch, "tars")
        order = permute(np.arange(len(self.urls), dtype=np.int64), len(self.urls), keys)
        return [self.urls[i] for i in order[reader :: self.readers].tolist()]

    def shuffled(self, rows: Iterable[T], url: str, epoch: int, buffer: int) -> Iterator[T]:
        """Yield the rows of a tar, shuffled within blocks of ``buffer`` rows."""
        block: list[T] = []
        number = 0
        for row in rows:
            block.append(row)
            if len(block) == buffer:
                yield from self._permuted(block, url, epoch, number)
                block, number = [], number + 1
        yield from self._permuted(block, url, epoch, number)

    def _permuted(self, block: Sequence[T], url: str, epoch: int, number: int) -> Iterator[T]:
        tar = url.rpartition("/")[2]  # the order stays when the tars move
        keys = round_keys(self.seed, self.corpus, epoch, f"rows {tar} {number}")
        return (block[i] for i in permute(np.arange(len(block), dtype=np.int64), len(block), keys).tolist())


def approximate(places: Sequence[Sequence[Place]], order: ShardOrder) -> Place:
    """Return a place for all readers where there were another number of them: about as many tars are read.

    Args:
        places: Place of every reader, by process and worker.
        order: Order of the readers that there are now.
    """
    before = [place for of_process in places for place in of_process]
    per_pass = len(order.urls) / len(before)
    passes = sum(place.epoch + min(1.0, place.shard / per_pass) for place in before) / len(before)
    epoch = int(passes)
    return Place(epoch, int((passes - epoch) * len(order.urls) / order.readers), 0)
