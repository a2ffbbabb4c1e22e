"""Micro-batches by number, read by a standard DataLoader whose workers keep no state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from .buckets import Buckets
from .permutation import CorpusOrder, slot_quantiles, slot_seeds
from .progress import Progress

BLOCK = 4096  # number of counters permuted together

Batch = dict[str, Any]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class SampleIndices:
    """The samples of a micro-batch.

    Attributes:
        corpus: Number of each sample's corpus, new corpora first, ``(n,)``.
        row: Row of each sample in its corpus, ``(n,)``.
        seed: Seed of each sample's randomness, ``(n,)``.
        bucket: Bucket of the batch.
        training: Whether the batch is for training, not for evaluation.
        quantile: Quantile of each training sample, ``(n,)`` in [0, 1): see :func:`.permutation.slot_quantiles`.
    """

    corpus: Numbers
    row: Numbers
    seed: Numbers
    bucket: int
    training: bool
    quantile: NDArray[np.float64] | None = None


def as_is(batch: Batch) -> Batch:
    """Return the batch unchanged; the default conversion would move every array to a shared memory file."""
    return batch


class Rows(Protocol):
    """Samples of one corpus, by row number."""

    @property
    def path(self) -> str:
        """Path of the corpus for messages."""
        ...

    @property
    def buckets(self) -> Sequence[int]:
        """Number of samples in each bucket; most corpora have one bucket."""
        ...

    def __len__(self) -> int: ...

    def in_bucket(self, bucket: int, index: Numbers) -> Numbers:
        """Return the row of each sample of a bucket."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of everything that decides which sample has which number."""
        ...

    def locate(self, row: int) -> str:
        """Return the place of a row for messages."""
        ...


@runtime_checkable
class Streamed(Protocol):
    """Corpus whose rows are read in sequence, without numbers."""

    streamed: bool

    def seek(self, number: int) -> None:
        """Choose the reader of a micro-batch."""

    def place(self) -> tuple[int, int, int, int]:
        """Return the worker of the latest micro-batch and the position of its reader after it."""
        ...


Reader = Callable[[SampleIndices], Batch]
"""Function that turns picks into the model's batch; it is sent to worker processes."""


class MicroBatches(Dataset[Batch]):
    """Micro-batches by number. Their samples are a pure function of the number, so any worker can read any of them.

    Args:
        buckets: Buckets that give corpus, counter and bucket at a step.
        orders: Order of each corpus (numbered as in the mixture) and bucket.
        sources: Rows of each corpus.
        read: Function that reads the batch of some picks.
        slots: This rank's slots of the global batch.
        accumulation: Number of micro-batches that the slots are split into.
        start: Step at which the dataset began; numbers count from step 0.
        seed: Seed of the samples' randomness.
    """

    def __init__(
        self,
        buckets: Buckets,
        orders: Sequence[Sequence[CorpusOrder]],
        sources: Sequence[Rows],
        read: Reader,
        slots: range,
        accumulation: int = 1,
        start: int = 0,
        seed: int = 0,
    ) -> None:
        self._buckets, self._orders, self._sources, self._read = buckets, orders, sources, read
        self._slots, self._accumulation, self._start, self._seed = slots, accumulation, start, seed
        self._blocks: dict[tuple[int, int], tuple[int, Numbers]] = {}
        self._numbered = [not isinstance(source, Streamed) for source in sources]
        self._streams = [source for source in sources if isinstance(source, Streamed)]

    def rows_of(self, number: int) -> Numbers:
        """Return the number of samples from each corpus in a micro-batch, without reading it."""
        slots = self._slots_of(number % self._accumulation)
        corpus, _, _ = self._buckets.batch(number // self._accumulation - self._start)
        return np.bincount(corpus[slots.start : slots.stop], minlength=len(self._sources))

    def _slots_of(self, micro: int) -> range:
        size = len(self._slots) // self._accumulation
        return self._slots[micro * size : (micro + 1) * size]

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self._accumulation)
        slots = self._slots_of(micro)
        corpus, counter, bucket = self._buckets.batch(step - self._start)
        corpus, counter = corpus[slots.start : slots.stop], counter[slots.start : slots.stop]
        rows = np.empty_like(counter)
        for index, source in enumerate(self._sources):
            mine = corpus == index
            if mine.any():
                own = int(self._buckets.bucket_of[index, bucket])
                numbered = self._numbered[index]
                rows[mine] = (
                    source.in_bucket(own, self._index(index, own, counter[mine])) if numbered else counter[mine]
                )
        for stream in self._streams:
            stream.seek(number)
        numbers = np.arange(slots.start, slots.stop)
        seeds, quantiles = slot_seeds(self._seed, step, numbers), slot_quantiles(self._seed, step, numbers)
        picks = SampleIndices(corpus, rows, seeds, bucket, training=True, quantile=quantiles)
        # Arrays that only the host reads stay NumPy: each tensor costs a shared memory file and a device copy.
        batch = self._read(picks)
        if not getattr(self._read, "names_origin", True):
            return batch
        batch |= {"corpus": corpus, "row": rows}
        if self._streams:
            batch["places"] = np.array([stream.place() for stream in self._streams], dtype=np.int64)
        return batch

    def _index(self, corpus: int, bucket: int, counters: Numbers) -> Numbers:
        """Return the index in the bucket of each counter, permuting whole blocks: NumPy does so as fast as one row."""
        order = self._orders[corpus][bucket]
        size = min(BLOCK, order.rows)  # spans at most two epochs, and each is permuted separately
        first = int(counters[0]) // size * size
        if counters[-1] >= first + size or counters[0] > counters[-1]:
            return order.row(counters)
        known = self._blocks.get((corpus, bucket))
        if known is None or known[0] != first:
            known = first, order.row(np.arange(first, first + size))
            self._blocks[corpus, bucket] = known
        return known[1][counters - first]


class EvaluationRows(Dataset[Batch]):
    """Batches of consecutive rows by bucket; every rank has equally many, padded with rows whose ``valid`` is 0.

    Args:
        source: Rows of the corpus.
        read: Function that reads the batch of some picks, in which the corpus has number 0.
        rows: Number of rows per batch.
        rank: Number of this process.
        world_size: Number of processes.
        seed: Seed of the samples' randomness, which does not change with the step.
    """

    def __init__(
        self, source: Rows, read: Reader, rows: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        self._source, self._read, self._rows, self._seed = source, read, rows, seed
        self._rank, self._world_size = rank, world_size
        self._ends = np.cumsum([-(-count // (rows * world_size)) for count in source.buckets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        bucket = int(np.searchsorted(self._ends, number, side="right"))
        number -= int(self._ends[bucket - 1]) if bucket else 0
        begin = (number * self._world_size + self._rank) * self._rows
        index = np.arange(begin, begin + self._rows)
        valid = index < self._source.buckets[bucket]
        index[~valid] = 0
        rows = self._source.in_bucket(bucket, index)
        picks = SampleIndices(np.zeros_like(rows), rows, slot_seeds(self._seed, 0, rows), bucket, training=False)
        batch = self._read(picks)
        valid &= ~batch.get("replaced", np.False_)
        return batch | {"row": torch.from_numpy(rows), "valid": torch.from_numpy(valid)}


class Positions(SequentialSampler):
    """Sampler of the numbers of the micro-batches from the current one on.

    Its length is that of the whole run or the epoch, because Lightning counts the batches before a restore itself.

    Args:
        progress: Position of the data module when iteration begins, and its epochs.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __len__(self) -> int:
        epochs = self._progress.epochs
        return self._progress.accumulation * (epochs.steps if epochs.whole_run is None else epochs.whole_run)

    def __iter__(self) -> Iterator[int]:
        progress, epochs = self._progress, self._progress.epochs
        begin = progress.step
        if epochs.whole_run is not None:
            end = epochs.whole_run
        else:
            done = epochs.done(progress.step, progress.start)
            begin = progress.start + done if epochs.repeats else progress.step
            end = begin - done + epochs.steps
        return iter(range(begin * progress.accumulation, end * progress.accumulation))


def loader(dataset: Dataset[Batch], sampler: Sampler[int] | None, num_workers: int) -> DataLoader[Batch]:
    """Return a DataLoader that yields whole batches of the dataset."""
    pinned = torch.cuda.is_available()
    own = torch.Generator()  # iterating draws a seed for workers, not from the state that dropout uses
    return _Loader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=as_is,  # type: ignore[arg-type]  # typed for lists, but gets one sample without batching
        pin_memory=pinned,
        generator=own,
    )


class _Loader(DataLoader[Batch]):
    """A standard DataLoader with the methods that Lightning requires to resume within an epoch.

    The position is stored in the data module's state: a loader's own is that of rank 0, and it prefetches.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
