"""Samples of named corpora as exact global batches: what data modules of text and of images have in common.

The chain, each link a pure function of the step (no generator, sampler or worker keeps state):

1. :mod:`.sampling.mixture`: step -> corpus and counter of every slot of the global batch.
2. :mod:`.sampling.buckets`: step -> the bucket (shape of image) that its batch is of, and counters within it.
3. :mod:`.sampling.permutation`: counter -> epoch and row of the corpus.
4. A reader: rows -> what the model is given.
5. A map-style dataset over micro-batches, read by a stock DataLoader. Rank r takes a contiguous slice of the batch.

What is kept in a checkpoint is the step, the step at which the dataset began, the running sum of the replay share, how
far each corpus was read when it was learnt, and how far it was replayed since (:mod:`.sampling.replay_history`). Over a
chain of datasets replay advances: each dataset replays what comes after the rows that those before it replayed.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from .. import UsageError
from ..lightning_compat import keep_samplers
from .sampling.buckets import Buckets
from .sampling.epochs import CorpusEpochs
from .sampling.micro_batches import Batch, EvaluationRows, MicroBatches, Positions, Reader, Rows, loader
from .sampling.mixture import Mixture, RunningShare
from .sampling.permutation import CorpusOrder
from .sampling.progress import Progress
from .sampling.replay_history import Ledger, Reading
from .sampling.trainer_limits import epochs_of, refuse_other_batch_sizes
from .streaming.order import ShardOrder
from .streaming.places import StreamPlaces
from .streaming.stream import Stream, expand_tars

R = TypeVar("R", bound=Rows)


@dataclass
class Corpus:
    """A corpus to train on.

    Args:
        path: Folder with ``index.json``, as ``rewurst prepare`` writes it; also a URL with the extra ``remote``.
        weight: Share among the new corpora (default: 1), or among the replayed ones (default: the rows that were
            learnt of it, or all of its rows if that is not known).
        replay: Old data, read as much as :class:`~rewurst.callbacks.ReplayScheduler` says.
        source: Text to prepare, instead of a path: files, folders, URLs or built-in corpora
            (:class:`~rewurst.datamodules.TextDataModule` only).
        stream: Tars to read in sequence without an index, instead of a path: paths, folders or URLs with braces, of
            token rows, of text, or of captioned images.
        allow_pipe: Whether ``stream`` may have ``pipe:COMMAND``, which runs the command in a shell.

    Raises:
        UsageError: Not exactly one of path, source and stream is given.
    """

    path: str = ""
    weight: float | None = None
    replay: bool = False
    source: str | list[str] | None = None
    stream: str | list[str] | None = None
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        of_stream = f"stream {self.stream}" if self.stream else ""
        if bool(self.path and self.path != of_stream) + bool(self.source) + bool(self.stream) != 1:
            raise UsageError(
                f"a corpus needs a path, a source or a stream; path is {self.path!r}, source is {self.source!r}, "
                f"stream is {self.stream!r}"
            )
        self.path = self.path or of_stream


class StreamDataModule(LightningDataModule, Generic[R]):
    """Corpora, order, replay and resume; a subclass opens corpora and reads batches.

    A training batch says where its samples come from in NumPy arrays ``(n,)``: ``corpus``, numbered with the new
    corpora first, and ``row`` in it. Validation batches have tensors ``row`` and ``valid``, which is 0 for samples that
    only fill up. Validation loaders are a dict by corpus.

    Args:
        dataset: Name of what is being learnt; another name later means another dataset.
        corpora: Training corpora by name. Old data keeps its name, so that it comes in the order of its first reading.
        val: Folders of validation corpora by name.
        micro_batch_size: Samples in one forward pass of one device.
        global_batch_size: Samples in one optimizer step; gradient accumulation follows from it.
        num_workers: Loader processes of each device.
        seed: Seed of the order.
        shuffle: ``"full"`` over all samples, or ``"window"``, which reads blocks of neighbouring ones.
        validate_every_n_steps: Steps between validations. Lightning's own ``val_check_interval`` counts micro-batches.

    Raises:
        UsageError: Sizes that do not divide, corpora that do not fit together, a checkpoint of the same dataset with
            other data.
    """

    def __init__(
        self,
        dataset: str,
        corpora: dict[str, Corpus],
        val: dict[str, str],
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: Literal["full", "window"] = "full",
        validate_every_n_steps: int | None = None,
    ) -> None:
        super().__init__()
        unprepared = [name for name, corpus in corpora.items() if corpus.source]
        if unprepared and not self.prepares_sources:
            raise UsageError(
                f"corpus {unprepared[0]!r} has a source, which only TextDataModule prepares; give a prepared path"
            )
        if all(corpus.replay for corpus in corpora.values()):
            raise UsageError(f"dataset {dataset!r} has no corpus without replay: true; give it one to learn")
        sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": global_batch_size}
        for name, value in {**sizes, "validate_every_n_steps": validate_every_n_steps}.items():
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} must be at least 1")
        self.dataset = dataset
        self.corpora = corpora
        self.val = val
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle = shuffle
        self.validate_every_n_steps = validate_every_n_steps
        self.accumulation = 1
        self.progress = Progress(self._used, self._step_done)
        self._share: Any = None
        self._opened: dict[str, R] = {}
        self._restored_sum = (0, 0)
        self._restored_buckets: Sequence[Sequence[int]] | None = None
        self._ledger = Ledger()
        self._replayed = Ledger()  # before this dataset
        self._weigh_by_rows = True  # runs that were started by earlier versions replay every corpus equally
        self._current: Buckets | None = None
        self._epochs: CorpusEpochs | None = None
        self._places = StreamPlaces()

    prepares_sources = False

    def streamed_tars(self, name: str, path: str) -> list[str] | None:
        """Return the tars of a streamed corpus, none for a corpus with an index.

        Args:
            name: Name of a corpus; a validation corpus may have the same one.
            path: Path that is to be opened.
        """
        corpus = self.corpora.get(name)
        if corpus is None or corpus.stream is None or corpus.path != path:
            return None
        return expand_tars(corpus.stream, corpus.allow_pipe)

    @abstractmethod
    def open_corpus(self, name: str, path: str) -> R:
        """Open a corpus and check that it fits what is open already."""

    @abstractmethod
    def reader(self, sources: Sequence[R]) -> Reader:
        """Return the function that turns indices of rows into a batch."""

    @abstractmethod
    def example_batch(self, micro_batch_size: int) -> Batch:
        """Return a batch of the shapes and dtypes that ``training_step`` gets; values are of no account.

        `rewurst plan` asks for it before anything is prepared: no corpus is opened where the arguments are enough.
        """

    @property
    def replay_corpora(self) -> Sequence[str]:
        """Names of the corpora to replay."""
        return [name for name, corpus in self.corpora.items() if corpus.replay]

    @property
    def dataset_step(self) -> int:
        """Completed global batches of this dataset."""
        return self.progress.step - self.progress.start

    def new_weights(self) -> dict[str, float]:
        """Return the weight of every corpus that is learnt."""
        given = {name: corpus.weight for name, corpus in self.corpora.items() if not corpus.replay}
        return {name: 1.0 if weight is None else weight for name, weight in given.items()}

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch: one pass over the new corpora, or what the Trainer limits it to.

        Raises:
            UsageError: They are not open yet.
        """
        if self.trainer is None or any(corpus.path not in self._opened for corpus in self.corpora.values()):
            raise UsageError("the steps of an epoch are known when the corpora are open; before that, write steps")
        return self.progress.epochs.steps

    def set_replay_share(self, share: Any) -> None:
        """Take the share of old rows: a number in [0, 1], or a picklable function of the dataset's step."""
        self._share = share

    def rows_read(self) -> Mapping[str, int]:
        """Rows used in training since the dataset began, by corpus: this process's, plus those before a restore."""
        return dict(zip(self._order_of_names(), self.progress.rows.tolist(), strict=True))

    def setup(self, stage: str) -> None:
        """Open the corpora and settle accumulation."""
        training = [(name, corpus.path) for name, corpus in self.corpora.items()] if stage == "fit" else []
        for name, path in [*training, *self.val.items()]:
            if path not in self._opened:
                self._opened[path] = self.open_corpus(name, path)
        if self.trainer is not None and self.trainer.world_size > 1:
            # Every rank gets its own rows here; Lightning's sampler would take a part of that part.
            keep_samplers(self.trainer)
        if stage == "fit" and self.trainer is not None:
            if not self.val:
                self.trainer.limit_val_batches = 0  # Lightning warns of loaders that are a dict of none
            refuse_other_batch_sizes(self.trainer)
            self._settle_accumulation()
            if self.trainer.global_step == 0:  # a fresh run, or one whose checkpoint is about to be loaded
                self._begin_anew()
            self._settle_epochs()

    def _begin_anew(self) -> None:
        """Forgets an earlier run that this object has been through."""
        self.progress.restore(step=0, start=0, restored=False)
        self._restored_sum, self._restored_buckets = (0, 0), None
        self._ledger, self._current, self._epochs = Ledger(), None, None
        self._replayed, self._weigh_by_rows = Ledger(), True
        self._places = StreamPlaces()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches from the current step on: see :class:`.sampling.trainer_limits.Epochs`."""
        assert self.trainer is not None
        buckets = self._current = self._buckets()
        if self.trainer.is_global_zero and not self.progress.rows.any():
            # what was read before a restore, told once
            self.progress.rows = buckets.mixture.read_before(self._different_steps)
        self._epochs = self._epochs or CorpusEpochs(self._rows_of_first_reading(), self._numbered(buckets.mixture.new))
        slots = range(self.global_batch_size)
        of_rank = len(slots) // self.trainer.world_size  # contiguous: a strided slice could hold every old row
        slots = slots[self.trainer.global_rank * of_rank :][:of_rank]
        sources = self._sources()
        self._deal_streams(sources)
        rows = MicroBatches(
            buckets,
            self._orders(),
            sources,
            self.reader(sources),
            slots,
            accumulation=self.accumulation,
            start=self.progress.start,
            seed=self.seed,
        )
        self.progress.rows_of = rows.rows_of
        return loader(rows, Positions(self.progress), self.num_workers)

    def val_dataloader(self) -> dict[str, DataLoader[Batch]]:
        """Every row of every validation corpus once, in order, over all ranks."""
        return self._evaluation_loaders()

    def test_dataloader(self) -> dict[str, DataLoader[Batch]]:
        """Return loaders of the validation corpora."""
        return self._evaluation_loaders()

    def predict_dataloader(self) -> dict[str, DataLoader[Batch]]:
        """Return loaders of the validation corpora."""
        return self._evaluation_loaders()

    def locate(self, batch: Batch) -> str:
        """Where the samples of a training batch lie: corpus, shard and member of each."""
        names = self._order_of_names()
        places = []
        for corpus, row in zip(batch["corpus"].tolist(), batch["row"].tolist(), strict=True):
            places.append(f"{names[corpus]}: {self._opened[self.corpora[names[corpus]].path].locate(row)}")
        return "; ".join(places)

    def state_dict(self) -> dict[str, Any]:
        """Dataset, steps, the running sum of the share, the ledger, and a fingerprint of all that decides the order."""
        buckets = self._current or self._buckets()
        counts = buckets.read_before(self._different_steps).tolist()
        names = buckets.mixture.names
        readings = [(name, self._reading(name, counts[names.index(name)])) for name in buckets.mixture.new]
        replayed = [(name, self._replay_so_far(name, counts[names.index(name)])) for name in buckets.mixture.old]
        state = {
            "dataset": self.dataset,
            "start": self.progress.start,
            "step": self.progress.step,
            "share_sum": buckets.mixture.share.total(self._different_steps),
            "ledger": self._ledger.with_readings(readings).state(),
            "replayed_before": self._replayed.state(),
            "replayed": self._replayed.with_readings(replayed).state(),
            "weigh_by_rows": self._weigh_by_rows,
            "fingerprint": self._fingerprint(),
        }
        if streams := self._places.state(self.trainer):
            state["streams"] = streams
        return state if len(buckets) == 1 else state | {"lanes": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the same dataset where it was, or begins another one at the restored step."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # validation needs no position, and its corpora may be anybody's
        self._ledger = Ledger(state["ledger"])
        if state["dataset"] != self.dataset:
            self._replayed, self._weigh_by_rows = Ledger(state.get("replayed")), True
            self.progress.restore(step=state["step"], start=state["step"])
            return
        self._replayed = Ledger(state.get("replayed_before"))
        self._weigh_by_rows = state.get("weigh_by_rows", False)
        if state["fingerprint"] != self._fingerprint():
            raise UsageError(
                f"dataset {self.dataset!r}: its corpora, weights, seed, shuffle or batch size differ from those of the "
                "checkpoint; put them back, or give what is new another dataset name"
            )
        self.progress.restore(step=state["step"], start=state["start"])
        if self.progress.epochs.repeats:
            return  # the batches are those from the start on
        self._restored_sum = (state["step"] - state["start"], state["share_sum"])
        self._restored_buckets = state.get("lanes")
        self._places.restore(state.get("streams", {}))

    def _deal_streams(self, sources: Sequence[R]) -> None:
        assert self.trainer is not None
        processes, workers = self.trainer.world_size, max(1, self.num_workers)
        for name, source in zip(self._order_of_names(), sources, strict=True):
            if isinstance(source, Stream):
                order = ShardOrder(name, source.urls, self.seed, processes * workers)
                places = self._places.begin(order, self.trainer.global_rank, processes, self.accumulation)
                source.deal(self.trainer.global_rank, order, self.progress.step * self.accumulation, places)

    def _used(self, batch: Batch) -> dict[str, float]:
        if isinstance(batch, dict) and "places" in batch:
            self._places.used([name for name in self._order_of_names() if self.corpora[name].stream], batch["places"])
        return self.batch_used(batch)

    def batch_used(self, batch: Batch) -> dict[str, float]:
        """Return what to log about a training batch that has been used; called with each."""
        return {}

    def bucket_of(self, names: Sequence[str]) -> tuple[Sequence[float], NDArray[np.int64] | None]:
        """Return the buckets' weights and the one each corpus reads from: see :class:`.sampling.buckets.Buckets`."""
        return (1.0,), None

    def bucket_name(self, bucket: int) -> str:
        """Name of a bucket; with that of the corpus it decides the order of the bucket's samples."""
        return ""

    def _numbered(self, names: Iterable[str]) -> list[str]:
        """Return the corpora whose rows have numbers."""
        return [name for name in names if not self.corpora[name].stream]

    def _rows_of_first_reading(self) -> dict[str, int]:
        rows = {}
        for name, source in zip(self._order_of_names(), self._sources(), strict=True):
            if self.corpora[name].stream:
                continue  # readers of a stream count their passes
            reading = self.reading(name)
            rows[name] = min(len(source), sum(reading.rows)) if reading is not None else len(source)
        return rows

    def _step_done(self) -> dict[str, float]:
        """Return the epoch of each corpus, and warn where new data is read again."""
        if self._current is None or self._epochs is None:
            return {}
        mixture = self._current.mixture
        counts = dict(zip(mixture.names, mixture.read_before(self._different_steps).tolist(), strict=True))
        whole_run = self.progress.epochs.whole_run
        last = 0 if whole_run is None else whole_run - self.progress.start
        return self._epochs.read(counts, self.dataset_step, last) | self._places.commit()

    def _settle_accumulation(self) -> None:
        assert self.trainer is not None
        rows = self.micro_batch_size * self.trainer.world_size
        if self.global_batch_size % rows:
            raise UsageError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
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
        # Lightning refuses it for modules that step themselves; these read `accumulation`.
        manual = not getattr(self.trainer.lightning_module, "automatic_optimization", True)
        self.trainer.accumulate_grad_batches = 1 if manual else self.accumulation
        if self.validate_every_n_steps is not None:
            self._settle_validation(self.validate_every_n_steps)

    def _settle_validation(self, steps: int) -> None:
        trainer = self.trainer
        assert trainer is not None
        interval = steps * self.accumulation
        if trainer.val_check_interval not in (1.0, interval):
            raise UsageError(
                f"validate_every_n_steps {steps} and trainer.val_check_interval {trainer.val_check_interval} are both "
                "set; leave the latter out"
            )
        trainer.val_check_interval, trainer.check_val_every_n_epoch = interval, None

    def _order_of_names(self) -> list[str]:
        """Return the names of the corpora, new ones first, as the mixture numbers them."""
        return sorted(self.corpora, key=lambda name: self.corpora[name].replay)

    def _sources(self) -> list[R]:
        return [self._opened[self.corpora[name].path] for name in self._order_of_names()]

    def _orders(self) -> list[list[CorpusOrder]]:
        """Return the order of each bucket of each corpus."""
        orders = []
        for name, source in zip(self._order_of_names(), self._sources(), strict=True):
            reading, replayed = self.reading(name), self._replay_before(name)
            of_corpus = []
            for bucket, rows in enumerate(source.buckets):
                key = f"{name} {self.bucket_name(bucket)}".rstrip()
                order = CorpusOrder(key, rows, self.seed, self.shuffle)
                if replayed is not None:
                    order = replace(
                        order, seed=replayed.seed, shuffle=replayed.shuffle, offset=int(replayed.rows[bucket])
                    )
                if reading is not None and reading.rows[bucket]:
                    first = reading.rows[bucket]
                    order = replace(order, seed=reading.seed, shuffle=reading.shuffle, first_reading=first)
                of_corpus.append(order)
            orders.append(of_corpus)
        return orders

    def reading(self, name: str) -> Reading | None:
        """How a corpus that is replayed was first read, where that is known."""
        if not self.corpora[name].replay:
            return None
        return self._ledger.reading(name, self._opened[self.corpora[name].path].fingerprint())

    def _reading(self, name: str, rows: Sequence[int]) -> Reading:
        fingerprint = self._opened[self.corpora[name].path].fingerprint()
        return Reading(self.seed, self.shuffle, rows, fingerprint[:16])

    def _replay_before(self, name: str) -> Reading | None:
        """Return how far earlier datasets replayed a corpus that this one replays; None if they did not."""
        if not self.corpora[name].replay:
            return None
        source = self._opened[self.corpora[name].path]
        replayed = self._replayed.reading(name, source.fingerprint())
        return replayed if replayed is not None and len(replayed.rows) == len(source.buckets) else None

    def _replay_so_far(self, name: str, rows: Sequence[int]) -> Reading:
        """Return how far a corpus has been replayed, given the rows of each bucket that this dataset replayed."""
        before = self._replay_before(name)
        first = self.reading(name) or before
        total = rows if before is None else [known + new for known, new in zip(before.rows, rows, strict=True)]
        own = self._reading(name, total)
        return own if first is None else replace(own, seed=first.seed, shuffle=first.shuffle)

    def _replay_weights(self) -> dict[str, float]:
        """Return the weight of every replayed corpus: the given ones, or the rows that were learnt.

        Raises:
            UsageError: Some have a weight and others have none.
        """
        given = {name: self.corpora[name].weight for name in self.replay_corpora}
        if len(given) < 2 or (None in given.values() and not self._weigh_by_rows):
            return {name: 1.0 if weight is None else weight for name, weight in given.items()}
        weights = {name: weight for name, weight in given.items() if weight is not None}
        if not weights:
            return {name: float(self._rows_learnt(name)) for name in given}
        if len(weights) < len(given):
            [without, *_] = given.keys() - weights.keys()
            raise UsageError(
                f"replayed corpus {without!r} has no weight and {next(iter(weights))!r} has one: give all of them a "
                "weight, or none to weigh them by the rows that were learnt"
            )
        return weights

    def _rows_learnt(self, name: str) -> int:
        """Return the distinct rows of a corpus that were learnt, or all of its rows if that is not known."""
        if self.corpora[name].stream:
            raise UsageError(f"replayed corpus {name!r} is a stream of unknown length: give it and the others a weight")
        reading, buckets = self.reading(name), self._opened[self.corpora[name].path].buckets
        if reading is None or len(reading.rows) != len(buckets):
            return sum(buckets)
        return sum(min(read, rows) for read, rows in zip(reading.rows, buckets, strict=True))

    def _buckets(self) -> Buckets:
        weights, bucket_of = self.bucket_of(self._order_of_names())
        counts = None if self._restored_buckets is None else np.array(self._restored_buckets, dtype=np.int64)
        return Buckets(self._mixture(), weights, bucket_of, self._restored_sum[0], counts)

    def _mixture(self) -> Mixture:
        if self.replay_corpora and self._share is None:
            raise UsageError(
                f"corpus {self.replay_corpora[0]!r} is to be replayed and nothing says how much: "
                "add the callback ReplayScheduler(share=0.05)"
            )
        share = RunningShare(self._share if self.replay_corpora else 0.0, *self._restored_sum)
        return Mixture(self.global_batch_size, self.new_weights(), self._replay_weights(), share)

    def _weight(self, name: str) -> float | None:
        """Return the weight that decides the order; None if it follows from the rows that were learnt."""
        corpus = self.corpora[name]
        by_rows = corpus.replay and self._weigh_by_rows and len(self.replay_corpora) > 1
        return 1.0 if corpus.weight is None and not by_rows else corpus.weight

    def _settle_epochs(self) -> None:
        """Follow the Trainer's limits, as the user set them: this object may have changed them in an earlier fit."""
        assert self.trainer is not None
        run: Any = self.trainer
        for callback in run.callbacks:
            if isinstance(callback, Progress) and callback.limits[1] == run.limit_train_batches:
                run.limit_train_batches = callback.limits[0]
        asked = run.limit_train_batches
        rows = sum(len(self._opened[corpus.path]) for corpus in self.corpora.values() if not corpus.replay)
        streams = [name for name, corpus in self.corpora.items() if corpus.stream]
        epochs = epochs_of(run, max(1, rows // self.global_batch_size), self.accumulation)
        if streams and epochs.whole_run is None:
            raise UsageError(
                f"corpus {streams[0]!r} is a stream, which has no epochs: set trainer.max_steps, and max_epochs to -1"
            )
        self.progress.attach(run, self.accumulation, len(self.corpora), epochs)
        self.progress.limits = (asked, run.limit_train_batches)

    @property
    def _different_steps(self) -> int:
        """Global batches of this dataset that were read at least once."""
        return self.progress.epochs.used(self.dataset_step)

    def _fingerprint(self) -> str:
        parts = {
            "corpora": [  # their order numbers them, so it decides which slots they fill
                [name, self._opened[corpus.path].fingerprint(), self._weight(name), corpus.replay]
                for name, corpus in self.corpora.items()
            ],
            "order": [self.seed, self.shuffle, self.global_batch_size],
        }
        if self.progress.epochs.repeats:
            parts["overfit_batches"] = [self.progress.epochs.steps]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _evaluation_loaders(self) -> dict[str, DataLoader[Batch]]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        loaders = {}
        for name, path in self.val.items():
            source = self._opened[path]
            rows = EvaluationRows(source, self.reader([source]), self.micro_batch_size, rank, world_size, self.seed)
            loaders[name] = loader(rows, None, self.num_workers)
        return loaders
