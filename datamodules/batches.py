"""Micro-batches by number, read by a stock DataLoader whose workers keep no state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .mixture import Mixture
from .order import CorpusOrder
from .progress import Progress
from .shards import TokenShards

Batch = dict[str, Any]
Source = tuple[CorpusOrder, TokenShards]


class MicroBatches(Dataset[Batch]):
    """Number of a micro-batch -> tokens: a pure function, so that any worker can read any of them.

    Args:
        mixture: Step -> corpus and counter of every slot.
        sources: Order and rows of each corpus, as the mixture numbers them.
        slots: This rank's slots of the global batch.
        accumulation: Micro-batches that the slots are read in.
        start: Step at which the dataset began; numbers count from step 0.
    """

    def __init__(
        self, mixture: Mixture, sources: Sequence[Source], slots: range, accumulation: int, start: int
    ) -> None:
        self._mixture, self._sources, self._start = mixture, sources, start
        self._slots, self._accumulation = slots, accumulation

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self._accumulation)
        size = len(self._slots) // self._accumulation
        slots = self._slots[micro * size : (micro + 1) * size]
        corpus, counter = (array[slots.start : slots.stop] for array in self._mixture.batch(step - self._start))
        rows = np.empty_like(counter)
        tokens = np.empty((size, self._sources[0][1].index.sequence_length + 1), dtype=np.int64)
        for index, (order, shards) in enumerate(self._sources):
            mine = corpus == index
            if mine.any():
                rows[mine] = order.row(counter[mine])
                tokens[mine] = shards.read(rows[mine])
        # What only the host reads stays NumPy: each tensor costs a worker a shared memory file, and a copy to a device.
        return {"input_ids": torch.from_numpy(tokens), "corpus": corpus, "row": rows}


class EvaluationRows(Dataset[Batch]):
    """Batches of consecutive rows; every rank has as many batches, filled up with rows whose ``valid`` is 0.

    Args:
        shards: The corpus.
        rows: Rows in a batch.
        rank: This process's number.
        world_size: Number of processes.
    """

    def __init__(self, shards: TokenShards, rows: int, rank: int = 0, world_size: int = 1) -> None:
        self._shards, self._rows, self._rank, self._world_size = shards, rows, rank, world_size

    def __len__(self) -> int:
        return -(-len(self._shards) // (self._rows * self._world_size))

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin = (number * self._world_size + self._rank) * self._rows
        rows = np.arange(begin, begin + self._rows)
        valid = rows < len(self._shards)
        rows[~valid] = 0
        tokens = torch.from_numpy(self._shards.read(rows))
        return {"input_ids": tokens, "row": torch.from_numpy(rows), "valid": torch.from_numpy(valid)}


class Positions(Sampler[int]):
    """Numbers of the micro-batches from the current one on.

    Its length is that of the whole run, or of the epoch: Lightning adds what was done before a restore.

    Args:
        progress: Where the data module stands when iteration begins.
        total: Micro-batches of the run, or of an epoch.
        absolute: Whether ``total`` counts from step 0 on, as ``max_steps`` does.
    """

    def __init__(self, progress: Progress, total: int, absolute: bool) -> None:
        self._progress, self._total, self._absolute = progress, total, absolute

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        begin = self._progress.step * self._progress.accumulation
        if self._absolute:
            return iter(range(begin, self._total))
        since = begin - self._progress.start * self._progress.accumulation
        return iter(range(begin, begin + self._total - since % self._total))


def loader(dataset: Dataset[Batch], sampler: Sampler[int] | None, num_workers: int) -> DataLoader[Batch]:
    """A DataLoader of whole batches."""
    pinned = torch.cuda.is_available()
    own = torch.Generator()  # beginning an iteration draws a seed for workers; not from the state that dropout uses
    return _Loader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=as_is,  # type: ignore[arg-type]  # typed for lists; without batching it gets one sample
        pin_memory=pinned,
        generator=own,
    )


def as_is(batch: Batch) -> Batch:
    """The loader's own conversion would make a tensor, and so a shared memory file, of every array."""
    return batch


class _Loader(DataLoader[Batch]):
    """A stock DataLoader; Lightning asks for these methods before it believes that a run can resume within an epoch.

    The position lives in the data module's state: a loader's own is that of rank 0, and it prefetches.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
