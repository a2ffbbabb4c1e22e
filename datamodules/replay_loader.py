"""Replay in any project: the datasets of its own DataLoaders, mixed at an exact share.

The chain is that of :mod:`.base`; instead of shards the rows are those of map-style datasets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from .. import UsageError
from .base import Corpus, StreamDataModule
from .sampling.micro_batches import Batch, Reader, SampleIndices

Loaders = DataLoader[Any] | Mapping[str, DataLoader[Any]]


@dataclass(frozen=True)
class DatasetRows:
    """The samples of a map-style dataset as rows.

    Args:
        path: Name, for messages.
        dataset: Any object with ``__len__`` and ``__getitem__``.
    """

    path: str
    dataset: Any = field(repr=False)

    @property
    def buckets(self) -> Sequence[int]:
        """One bucket of all samples."""
        return [len(self)]

    def __len__(self) -> int:
        return len(self.dataset)

    def in_bucket(self, bucket: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return row numbers, which are the indices."""
        return index

    def fingerprint(self) -> str:
        """Return what is known of a dataset: its length."""
        return f"{len(self)} samples"

    def locate(self, row: int) -> str:
        """Return the place of a sample."""
        return f"{self.path}[{row}]"


@dataclass(frozen=True)
class DatasetReader:
    """Collates rows of several datasets into one batch, each sample with randomness of its own.

    Args:
        datasets: Datasets, as picks number them.
        collate: Samples -> batch.
    """

    datasets: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    names_origin = False  # the batch is the project's own, with nothing added

    def __call__(self, picks: SampleIndices) -> Any:
        """Return the batch of some picks."""
        samples = []
        for corpus, row, seed in zip(picks.corpus.tolist(), picks.row.tolist(), picks.seed.tolist(), strict=True):
            with _seeded(seed):
                samples.append(self.datasets[corpus][row])
        return self.collate(samples)


class ReplayLoader(StreamDataModule[DatasetRows]):
    """Mixes the datasets of a project's own DataLoaders, old and new, for :class:`~rewurst.callbacks.ReplayScheduler`.

    Every global batch has an exact share of old samples, whatever the number of processes, workers and micro-batches,
    and a run that is stopped resumes with the next sample. The order is drawn from ``seed``: samplers of the loaders
    are not used. What a dataset draws at random is a function of the step, so that it does not depend on workers.

    Args:
        dataset: Name of what is being learnt; another name later means another dataset.
        new: DataLoader of the new data, or several by name. The first one's ``batch_size`` is that of a micro-batch,
            its ``collate_fn`` and ``num_workers`` are used for all.
        old: DataLoaders of the data to replay, by name. Old data keeps its name, so that it comes in the order of its
            first reading.
        val: DataLoaders for validation by name, used as they are.
        global_batch_size: Samples in one optimizer step; by default one micro-batch of each process.
        seed: Seed of the order.

    Raises:
        UsageError: A dataset has no row numbers, sizes do not divide, or names do not fit together.

    Example::

        data = ReplayLoader("code", code_loader, {"prose": prose_loader}, val={"prose": held_out})
        Trainer(callbacks=[ReplayScheduler(0.05), ExactResume()]).fit(module, data)
    """

    def __init__(
        self,
        dataset: str,
        new: Loaders,
        old: Mapping[str, DataLoader[Any]] | None = None,
        val: Mapping[str, DataLoader[Any]] | None = None,
        global_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        fresh = {dataset: new} if isinstance(new, DataLoader) else dict(new)
        both = sorted(fresh.keys() & (old or {}).keys())
        if both:
            raise UsageError(f"ReplayLoader: {both[0]!r} is both new and old")
        if not fresh:
            raise UsageError("ReplayLoader: there is nothing new to learn")
        self._loaders = {**fresh, **(old or {})}
        for name, loader in self._loaders.items():
            if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
                raise UsageError(f"ReplayLoader: {name!r} is an iterable dataset, whose samples have no numbers")
        self._first = next(iter(fresh.values()))
        if self._first.batch_size is None:
            raise UsageError("ReplayLoader: the new DataLoader has no batch_size, which is that of a micro-batch")
        self._validation = dict(val or {})
        super().__init__(
            dataset=dataset,
            corpora={name: Corpus(name, replay=name not in fresh) for name in self._loaders},
            val=dict.fromkeys(self._validation, ""),
            micro_batch_size=self._first.batch_size,
            global_batch_size=global_batch_size or self._first.batch_size,
            num_workers=self._first.num_workers,
            seed=seed,
        )
        self._follows_devices = global_batch_size is None

    def setup(self, stage: str) -> None:
        """Settle the global batch, and what base does."""
        if self._follows_devices and self.trainer is not None:
            self.global_batch_size = self.micro_batch_size * self.trainer.world_size
        super().setup(stage)

    def open_corpus(self, name: str, path: str) -> DatasetRows:
        """Return the rows of a loader's dataset."""
        loader = self._loaders[name] if path else self._validation[name]
        return DatasetRows(name, loader.dataset)

    def reader(self, sources: Sequence[DatasetRows]) -> Reader:
        """Return what collates the samples."""
        return DatasetReader([source.dataset for source in sources], self._first.collate_fn)

    def example_batch(self, micro_batch_size: int) -> Batch:
        """Return the first samples of the new data."""
        dataset: Any = self._first.dataset
        batch: Batch = self._first.collate_fn([dataset[index % len(dataset)] for index in range(micro_batch_size)])
        return batch

    def _evaluation_loaders(self) -> dict[str, DataLoader[Batch]]:
        return self._validation


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from every generator as a seed says, and leave them as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
