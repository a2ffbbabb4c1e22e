"""Where every reader of streamed corpora is: kept for completed global batches, saved, and dealt out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from ... import UsageError
from .order import Place, ShardOrder, approximate


class StreamPlaces:
    """Places of this process's readers, by corpus and worker."""

    def __init__(self) -> None:
        self._now: dict[str, list[Place]] = {}
        self._pending: list[tuple[str, int, Place]] = []
        self._restored: Mapping[str, Any] = {}
        self._repeated: set[str] = set()
        self.accumulation = 1

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint says; empty for a start at the beginning."""
        self._restored, self._now, self._pending = state, {}, []

    def begin(self, order: ShardOrder, process: int, processes: int, accumulation: int) -> list[Place]:
        """Return the places of this process's readers of a corpus when its loader begins.

        Args:
            order: Order of the corpus's tars.
            process: Number of this process.
            processes: Number of processes.
            accumulation: Micro-batches in a global batch.
        """
        self.accumulation, self._pending = accumulation, []
        if order.corpus not in self._now:
            self._now[order.corpus] = self._from_checkpoint(order, process, processes)
        return self._now[order.corpus]

    def _from_checkpoint(self, order: ShardOrder, process: int, processes: int) -> list[Place]:
        workers = order.readers // processes
        saved = self._restored.get("places", {}).get(order.corpus)
        if saved is None:
            return [Place()] * workers
        places = [[Place(*place) for place in of_process] for of_process in saved]
        shape = (len(places), len(places[0]), self._restored["accumulation"])
        if shape == (processes, workers, self.accumulation):
            return places[process]
        rank_zero_warn(
            f"corpus {order.corpus!r} is a stream that was read by {shape[0]} processes of {shape[1]} workers with "
            f"{shape[2]} micro-batches per step, now {processes}, {workers} and {self.accumulation}: it resumes "
            "approximately, so that some rows come again and others later"
        )
        return [approximate(places, order)] * workers

    def used(self, corpora: Sequence[str], places: Any) -> None:
        """Note where readers are after a micro-batch: (corpora, 4), a worker and its place for each."""
        for name, (worker, *place) in zip(corpora, np.asarray(places).tolist(), strict=True):
            self._pending.append((name, worker, Place(*place)))

    def commit(self) -> dict[str, float]:
        """Take over what a complete global batch has used; return the passes over each corpus, for logging.

        Raises:
            UsageError: Its batches did not say it.
        """
        if self._now and not self._pending:
            raise UsageError(
                "batches of streams have lost the entry places, which says where their readers are: leave it in"
            )
        for name, worker, place in self._pending:
            self._now[name] = [*self._now[name][:worker], place, *self._now[name][worker + 1 :]]
            if place.epoch and name not in self._repeated:
                self._repeated.add(name)
                rank_zero_warn(f"corpus {name!r} is read again: a reader has been through all of its tars")
        self._pending = []
        return {
            f"data/epoch/{name}": sum(place.epoch for place in places) / len(places)
            for name, places in self._now.items()
        }

    def state(self, trainer: Trainer | None) -> dict[str, Any]:
        """Return the places of all processes, plain values only; every process has to ask."""
        if not self._now:
            return dict(self._restored)
        places = {name: self._gathered(now, trainer) for name, now in self._now.items()}
        return {"places": places, "accumulation": self.accumulation}

    def _gathered(self, places: Sequence[Place], trainer: Trainer | None) -> list[list[list[int]]]:
        own = torch.tensor([list(place) for place in places], dtype=torch.int64)
        if trainer is None or trainer.world_size == 1:
            found: list[list[list[int]]] = [own.tolist()]
            return found
        whole: Any = trainer.strategy.all_gather(own.to(trainer.strategy.root_device))
        return whole.tolist()  # type: ignore[no-any-return]
