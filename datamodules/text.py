"""Token rows of named corpora as exact global batches.

The chain, each link a pure function of the step (no generator, sampler or worker keeps state):

1. :mod:`.mixture`: step -> corpus and counter of every slot of the global batch.
2. :mod:`.order`: counter -> epoch and row of the corpus.
3. :mod:`.shards`: row -> tokens, by memory map.
4. A map-style dataset over micro-batches, read by a stock DataLoader. Rank r takes a contiguous slice of the batch.

What is kept in a checkpoint is the step, the step at which the dataset began, the running sum of the replay share, and
how far each corpus was read when it was learnt (:mod:`.ledger`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from .. import UsageError
from .batches import Batch, EvaluationRows, MicroBatches, Positions, Source, loader
from .ledger import Ledger, Reading
from .mixture import Mixture, RunningShare
from .order import CorpusOrder
from .progress import Progress
from .shards import TokenShards


@dataclass
class Corpus:
    """A corpus to train on.

    Args:
        path: Folder that ``rewurst prepare text`` wrote (the one with ``index.json``).
        weight: Share among the new corpora, or among the replayed ones.
        replay: Old data, read as much as :class:`~rewurst.callbacks.ReplayScheduler` says.
    """

    path: str
    weight: float = 1.0
    replay: bool = False


class TextDataModule(LightningDataModule):
    """Rows of tokens from named corpora, with replay of old ones, as the same global batches on any machine.

    A training batch is a dict of ``input_ids`` (rows, sequence_length + 1), a tensor, and of NumPy arrays (rows,) that
    say where they come from: ``corpus``, numbered with the new corpora first, and ``row`` in it. Validation batches are
    tensors: ``input_ids``, ``row`` and ``valid`` (rows,), which is 0 for rows that only fill up. Validation loaders are
    a dict by corpus.

    Args:
        dataset: Name of what is being learnt; another name later means another dataset.
        corpora: Training corpora by name. Old data keeps its name, so that it comes in the order of its first reading.
        val: Folders of validation corpora by name.
        sequence_length: Tokens predicted a row, as prepared.
        micro_batch_size: Rows in one forward pass of one device.
        global_batch_size: Rows in one optimizer step; gradient accumulation follows from it.
        num_workers: Loader processes of each device.
        seed: Seed of the order.
        shuffle: ``"full"`` over all rows, or ``"window"``, which reads blocks of neighbouring rows.

    Raises:
        UsageError: Sizes that do not divide, corpora that differ in tokenizer or sequence length, a checkpoint of the
            same dataset with other data.
    """

    def __init__(
        self,
        dataset: str,
        corpora: dict[str, Corpus],
        val: dict[str, str],
        sequence_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: Literal["full", "window"] = "full",
    ) -> None:
        super().__init__()
        if all(corpus.replay for corpus in corpora.values()):
            raise UsageError(f"dataset {dataset!r} has no corpus without replay: true; give it one to learn")
        for name, value in (("micro_batch_size", micro_batch_size), ("global_batch_size", global_batch_size)):
            if value < 1:
                raise UsageError(f"{name} {value} must be at least 1")
        self.dataset = dataset
        self.corpora = corpora
        self.val = val
        self.sequence_length = sequence_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle = shuffle
        self.progress = Progress()
        self._share: Any = None
        self._opened: dict[str, TokenShards] = {}
        self._restored_sum = (0, 0)
        self._ledger = Ledger()
        self._mixed: Mixture | None = None

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens in a global batch."""
        return self.global_batch_size * self.sequence_length

    @property
    def replay_corpora(self) -> Sequence[str]:
        """Names of the corpora to replay."""
        return [name for name, corpus in self.corpora.items() if corpus.replay]

    @property
    def dataset_step(self) -> int:
        """Completed global batches of this dataset."""
        return self.progress.step - self.progress.start

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return next(iter(self._opened.values())).index.vocab_size

    @property
    def end_token(self) -> int:
        """The token that ends a document."""
        return next(iter(self._opened.values())).index.end_token

    @property
    def tokenizer_folder(self) -> str:
        """The tokenizer that lies beside the first corpus."""
        return str(next(iter(self._opened.values())).folder / "tokenizer")

    def set_replay_share(self, share: Any) -> None:
        """Takes the share of old rows: a number in [0, 1], or a picklable function of the dataset's step."""
        self._share = share

    def rows_read(self) -> Mapping[str, int]:
        """Rows used in training since the dataset began, by corpus: this process's, plus those before a restore."""
        return dict(zip(self._order_of_names(), self.progress.rows.tolist(), strict=True))

    def setup(self, stage: str) -> None:
        """Opens the corpora and settles accumulation."""
        training = [(name, corpus.path) for name, corpus in self.corpora.items()] if stage == "fit" else []
        for name, path in [*training, *self.val.items()]:
            if path not in self._opened:
                self._opened[path] = self._open(name, path)
        if self.trainer is not None and self.trainer.world_size > 1:
            # Every rank gets its own rows here; Lightning's sampler would take a part of that part.
            self.trainer._accelerator_connector.use_distributed_sampler = False
        if stage == "fit" and self.trainer is not None:
            self._settle_accumulation()
            if self.trainer.global_step == 0:  # a fresh run, or one whose checkpoint is about to be loaded
                self._begin_anew()
            self.progress.attach(self.trainer, self.accumulation, len(self.corpora), self._epoch_steps())

    def _begin_anew(self) -> None:
        """Forgets an earlier run that this object has been through."""
        self.progress.restore(step=0, start=0, restored=False)
        self._restored_sum, self._ledger, self._mixed = (0, 0), Ledger(), None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches from the current step to ``max_steps``, or of one pass over the new corpora."""
        assert self.trainer is not None
        mixture = self._mixed = self._mixture()
        if self.trainer.is_global_zero and not self.progress.rows.any():
            self.progress.rows = mixture.read_before(self.dataset_step)  # what was read before a restore, told once
        slots = range(self.global_batch_size)
        of_rank = len(slots) // self.trainer.world_size  # contiguous: a strided slice could hold every old row
        slots = slots[self.trainer.global_rank * of_rank :][:of_rank]
        rows = MicroBatches(mixture, self._sources(), slots, self.accumulation, self.progress.start)
        total = self._steps() * self.accumulation
        return loader(rows, Positions(self.progress, total, self.trainer.max_steps > 0), self.num_workers)

    def val_dataloader(self) -> dict[str, DataLoader[Batch]]:
        """Every row of every validation corpus once, in order, over all ranks."""
        return self._evaluation_loaders()

    def test_dataloader(self) -> dict[str, DataLoader[Batch]]:
        """The validation corpora."""
        return self._evaluation_loaders()

    def predict_dataloader(self) -> dict[str, DataLoader[Batch]]:
        """The validation corpora."""
        return self._evaluation_loaders()

    def locate(self, batch: Batch) -> str:
        """Where the rows of a training batch lie: corpus, shard, member and row of each."""
        names = self._order_of_names()
        places = []
        for corpus, row in zip(batch["corpus"].tolist(), batch["row"].tolist(), strict=True):
            places.append(f"{names[corpus]}: {self._opened[self.corpora[names[corpus]].path].locate(row)}")
        return "; ".join(places)

    def state_dict(self) -> dict[str, Any]:
        """Dataset, steps, the running sum of the share, the ledger, and a fingerprint of all that decides the order."""
        mixture = self._mixed or self._mixture()
        read = dict(zip(mixture.names, mixture.read_before(self.dataset_step).tolist(), strict=True))
        readings = [(name, self._reading(name, read[name])) for name in mixture.new]
        return {
            "dataset": self.dataset,
            "start": self.progress.start,
            "step": self.progress.step,
            "share_sum": mixture.share.total(self.dataset_step),
            "ledger": self._ledger.with_readings(readings).state(),
            "fingerprint": self._fingerprint(),
            "tokenizer": self.tokenizer_folder,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the same dataset where it was, or begins another one at the restored step."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # validation needs no position, and its corpora may be anybody's
        self._ledger = Ledger(state["ledger"])
        if state["dataset"] != self.dataset:
            self.progress.restore(step=state["step"], start=state["step"])
            return
        if state["fingerprint"] != self._fingerprint():
            raise UsageError(
                f"dataset {self.dataset!r}: its corpora, weights, seed, shuffle or batch size differ from those of the "
                "checkpoint; put them back, or give what is new another dataset name"
            )
        self.progress.restore(step=state["step"], start=state["start"])
        self._restored_sum = (state["step"] - state["start"], state["share_sum"])

    def _open(self, name: str, path: str) -> TokenShards:
        shards = TokenShards(path)
        first = next(iter(self._opened.values()), shards)
        if shards.index.sequence_length != self.sequence_length:
            raise UsageError(
                f"corpus {name!r} ({path}) has rows of sequence_length {shards.index.sequence_length}, asked for is "
                f"{self.sequence_length}: prepare it again, or set sequence_length to that"
            )
        if shards.index.tokenizer_sha256 != first.index.tokenizer_sha256:
            raise UsageError(f"corpus {name!r} ({path}) was prepared with another tokenizer than {first.folder}")
        return shards

    def _settle_accumulation(self) -> None:
        assert self.trainer is not None
        rows = self.micro_batch_size * self.trainer.world_size
        if self.global_batch_size % rows:
            raise UsageError(
                f"global_batch_size {self.global_batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size} times {self.trainer.world_size} devices"
            )
        self.accumulation = self.global_batch_size // rows
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        before = [c.accumulation for c in callbacks if isinstance(c, Progress)]  # set by us, not by the user
        if self.trainer.accumulate_grad_batches not in (1, self.accumulation, *before):
            raise UsageError(
                f"accumulate_grad_batches {self.trainer.accumulate_grad_batches} contradicts global_batch_size "
                f"{self.global_batch_size} / ({self.micro_batch_size} x {self.trainer.world_size}) = "
                f"{self.accumulation}: leave it out"
            )
        self.trainer.accumulate_grad_batches = self.accumulation

    def _order_of_names(self) -> list[str]:
        """New corpora first, as the mixture numbers them."""
        return sorted(self.corpora, key=lambda name: self.corpora[name].replay)

    def _sources(self) -> list[Source]:
        sources = []
        for name in self._order_of_names():
            rows = self._opened[self.corpora[name].path]
            order = CorpusOrder(name, len(rows), self.seed, self.shuffle)
            reading = self._ledger.reading(name, rows.fingerprint()) if self.corpora[name].replay else None
            if reading is not None:
                order = replace(order, seed=reading.seed, shuffle=reading.shuffle, first_reading=reading.rows)
            sources.append((order, rows))
        return sources

    def _reading(self, name: str, rows: int) -> Reading:
        fingerprint = self._opened[self.corpora[name].path].fingerprint()
        return Reading(self.seed, self.shuffle, rows, fingerprint[:16])

    def _running_share(self) -> RunningShare:
        return RunningShare(self._share if self.replay_corpora else 0.0, *self._restored_sum)

    def _mixture(self) -> Mixture:
        if self.replay_corpora and self._share is None:
            raise UsageError(
                f"corpus {self.replay_corpora[0]!r} is to be replayed and nothing says how much: "
                "add the callback ReplayScheduler(share=0.05)"
            )
        new = {name: corpus.weight for name, corpus in self.corpora.items() if not corpus.replay}
        old = {name: corpus.weight for name, corpus in self.corpora.items() if corpus.replay}
        return Mixture(self.global_batch_size, new, old, self._running_share())

    def _steps(self) -> int:
        """Absolute ``max_steps`` where it is set, else the steps of an epoch."""
        assert self.trainer is not None
        return int(self.trainer.max_steps) if self.trainer.max_steps > 0 else self._epoch_steps()

    def _epoch_steps(self) -> int:
        """Steps of one pass over the new corpora."""
        rows = sum(len(self._opened[corpus.path]) for corpus in self.corpora.values() if not corpus.replay)
        return max(1, rows // self.global_batch_size)

    def _fingerprint(self) -> str:
        parts = {
            "corpora": [  # their order numbers them, so it decides which slots they fill
                [name, self._opened[corpus.path].fingerprint(), corpus.weight, corpus.replay]
                for name, corpus in self.corpora.items()
            ],
            "order": [self.seed, self.shuffle, self.global_batch_size],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _evaluation_loaders(self) -> dict[str, DataLoader[Batch]]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        loaders = {}
        for name, path in self.val.items():
            rows = EvaluationRows(self._opened[path], self.micro_batch_size, rank, world_size)
            loaders[name] = loader(rows, None, self.num_workers)
        return loaders
