"""The stream is a pure function: batches do not depend on how they are split, nor their cost on the position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rewurst.callbacks import linear
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.datamodules.sampling import permutation as order_module
from rewurst.datamodules.sampling.buckets import Buckets
from rewurst.datamodules.sampling.micro_batches import MicroBatches, Positions, SampleIndices, as_is
from rewurst.datamodules.sampling.mixture import Mixture, RunningShare
from rewurst.datamodules.sampling.permutation import CorpusOrder
from rewurst.datamodules.sampling.progress import Progress
from rewurst.datamodules.sampling.trainer_limits import Epochs
from rewurst.datamodules.text import TokenReader


class Numbered:
    """A corpus of numbers."""

    def __init__(self, rows: int) -> None:
        self.buckets, self.path = (rows,), "numbers"

    def __len__(self) -> int:
        return self.buckets[0]

    def in_bucket(self, bucket: int, index: Any) -> Any:
        return index

    def fingerprint(self) -> str:
        return str(self.buckets)

    def locate(self, row: int) -> str:
        return str(row)


def nothing(picks: SampleIndices) -> dict[str, Any]:
    """Reader that returns its requests."""
    assert picks.quantile is not None
    return {"seed": picks.seed, "quantile": picks.quantile}


def dataset(rows: int, old: int, size: int, share: float, slots: range, accumulation: int) -> MicroBatches:
    mixture = Mixture(size, {"new": 1.0}, {"old": 1.0} if share else {}, RunningShare(share))
    sources = [Numbered(rows), Numbered(old)][: 1 + bool(share)]
    orders = [[CorpusOrder(name, len(source), 3)] for name, source in zip(mixture.names, sources, strict=True)]
    return MicroBatches(Buckets(mixture), orders, sources, nothing, slots, accumulation=accumulation, seed=3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    old=st.integers(1, 300),
    world_size=st.integers(1, 32),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.05, 0.37]),
    step=st.integers(0, 10**6),
)
def test_any_split_gives_the_same_global_batch(
    rows: int, old: int, world_size: int, micro: int, accumulation: int, share: float, step: int
) -> None:
    size = world_size * micro * accumulation
    whole = dataset(rows, old, size, share, range(size), 1)[step]
    parts = []
    for rank in range(world_size):
        slots = range(size)[rank * micro * accumulation : (rank + 1) * micro * accumulation]
        of_rank = dataset(rows, old, size, share, slots, accumulation)
        parts += [of_rank[step * accumulation + number] for number in range(accumulation)]
    for name in ("corpus", "row", "seed", "quantile"):
        assert np.concatenate([part[name] for part in parts]).tolist() == whole[name].tolist()
    counts = [int(part["corpus"].sum()) for part in parts]
    assert max(counts) - min(counts) <= 1  # old rows are spread evenly


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 200), size=st.integers(1, 40), epochs=st.integers(1, 3))
def test_every_row_exactly_once_per_epoch(rows: int, size: int, epochs: int) -> None:
    steps = -(-rows * epochs // size)
    batches = dataset(rows, 1, size, 0.0, range(size), 1)
    read = np.concatenate([batches[step]["row"] for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(read[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_any_number_of_workers_gives_the_same_batches(write_corpus: Callable[..., str], workers: int) -> None:
    shards = TokenShards(write_corpus("code"))
    order = [[CorpusOrder("code", len(shards), 0)]]
    rows = MicroBatches(
        Buckets(Mixture(8, {"code": 1.0})), order, [shards], TokenReader([shards]), range(8), accumulation=2
    )
    progress = Progress(lambda batch: {})
    progress.accumulation, progress.epochs = 2, Epochs(25, whole_run=10)
    loader = DataLoader(
        rows,
        batch_size=None,
        sampler=Positions(progress),
        num_workers=workers,
        collate_fn=as_is,  # type: ignore[arg-type]
    )
    for number, batch in enumerate(loader):
        assert torch.equal(batch["input_ids"], rows[number]["input_ids"])


@pytest.mark.parametrize("shuffle", ["full", "window"])
@pytest.mark.parametrize("buckets", [1, 3])
def test_the_first_batch_after_a_resume_costs_the_same_anywhere(
    monkeypatch: pytest.MonkeyPatch, shuffle: Any, buckets: int
) -> None:
    """Counts permutations, evaluations of the share and rows read, with a share that changes every step."""
    work: Counter[str] = Counter()

    def counted(value: int) -> float:
        work["share"] += 1
        return linear(value, length=2 * 10**6, start=0.25, end=0.5)

    def permute(index: Any, size: int, keys: Any) -> Any:
        work["permutations"] += 1
        return real(index, size, keys)

    def read(picks: SampleIndices) -> dict[str, Any]:
        work["rows"] += len(picks.row)
        return {}

    real = order_module.permute
    monkeypatch.setattr(order_module, "permute", permute)
    found = []
    for step in (10, 10**6):
        work.clear()
        mixture = Mixture(64, {"new": 1.0}, {"old": 1.0}, RunningShare(counted, step, step << 38))
        orders = [[CorpusOrder(name, 10**7, 0, shuffle)] * buckets for name in mixture.names]
        orders = [[replace(order, corpus=f"{order.corpus}{i}") for i, order in enumerate(of)] for of in orders]
        counts = np.full((2, buckets), 64 * step // (2 * buckets))
        at = Buckets(mixture, [1.0] * buckets, None, step, counts)
        sources = [Numbered(10**7)] * 2
        MicroBatches(at, orders, sources, read, range(64))[step]
        found.append(dict(work))
    assert found[0] == found[1]
    assert found[0]["rows"] == 64
