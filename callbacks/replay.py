"""How much of every batch is old data, asked for and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from .. import UsageError
from ..lightning_compat import logs_now
from .learning_rate.lengths import in_steps, parse_length
from .learning_rate.schedule_types import Schedule

Share = float | Callable[[int], float]


@runtime_checkable
class ReplaySource(Protocol):
    """Interface of a data module that can be driven by :class:`ReplayScheduler`."""

    dataset: str
    replay_corpora: Sequence[str]
    dataset_step: int  # completed global batches of this dataset

    def set_replay_share(self, share: Share) -> None:
        """Take the share of old rows, a number or a function of the dataset's step, before any loader exists."""

    def rows_read(self) -> Mapping[str, int]:
        """Rows of this process's batches that training has used since the dataset began here, by corpus."""


class ReplayScheduler(Callback):
    """Sets which share of every batch is replayed from old corpora, and logs what was read.

    The papers' runs are compute-equivalent: the old rows take the place of new ones, the batch stays (Ibrahim et al.
    2024, section 4.2; 5 % for a weak shift, 25 % for a strong one). Works with every data module that offers
    :class:`ReplaySource`, and with any LightningModule.

    Logs ``replay/share_asked``, ``replay/share_read`` (over all rows since the dataset began) and
    ``replay/rows/<corpus>``.

    Args:
        share: Share of old rows in [0, 1], constant or a schedule of the dataset's step.
        length: Length of that schedule in steps or tokens ("300B tokens"); a constant share needs none.

    Raises:
        UsageError: The share is not a fraction, a schedule lacks its length, the data module cannot replay.

    Example::

        Trainer(callbacks=[ReplayScheduler(0.05)]).fit(module, TextDataModule("code", {...}))
    """

    def __init__(self, share: float | Schedule, length: int | str | None = None) -> None:
        if isinstance(share, Schedule):
            if length is None:
                raise UsageError(f"share {share.describe()} is a schedule: it needs a length in steps or tokens")
            parse_length(length)
        elif not 0 <= share <= 1:
            raise UsageError(f"share {share} must lie between 0 and 1: 0.05 replays 5 %")
        self.share = share
        self.length = length
        self._source: ReplaySource | None = None
        self._function: Share = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hands the share to the data module."""
        if stage != "fit":
            return
        source = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(source, ReplaySource):
            raise UsageError(
                f"{type(source).__name__} cannot replay: ReplayScheduler needs a data module with dataset, "
                "dataset_step, replay_corpora, set_replay_share and rows_read (see rewurst.callbacks.ReplaySource); "
                "rewurst.datamodules.ReplayLoader makes one of your DataLoaders"
            )
        if not source.replay_corpora:
            raise UsageError(f"dataset {source.dataset!r} has no corpus to replay: mark the old ones with replay: true")
        self._source = source
        if isinstance(self.share, Schedule):
            assert self.length is not None
            # A partial of a method, not a lambda: loader workers may have to unpickle it.
            self._function = partial(self.share.value, length=in_steps(self.length, source))
        else:
            self._function = self.share
        source.set_replay_share(self._function)

    def state_dict(self) -> dict[str, Any]:
        """Return the dataset and its share, so that a changed share under the same name is noticed."""
        return {"dataset": self._source.dataset if self._source else None, "share": self._describe()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses another share for a dataset that has begun."""
        state = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn != TrainerFn.FITTING or state is None or self._source is None:
            return
        if state["dataset"] == self._source.dataset and state["share"] != self._describe():
            raise UsageError(
                f"dataset {state['dataset']!r} was begun with replay share {state['share']}, now it is "
                f"{self._describe()}: keep it, or give what is new another dataset name"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the trainer's logging interval."""
        if self._source is None or not logs_now(trainer):
            return
        rows = self._rows_of_all_ranks(trainer)
        total = sum(rows.values())
        metrics = {f"replay/rows/{corpus}": float(count) for corpus, count in rows.items()}
        metrics["replay/share_read"] = sum(rows[corpus] for corpus in self._source.replay_corpora) / max(total, 1)
        metrics["replay/share_asked"] = self._asked(self._source.dataset_step)
        pl_module.log_dict(metrics, batch_size=1)

    def _asked(self, step: int) -> float:
        return self._function(step) if callable(self._function) else self._function

    def _describe(self) -> str:
        if isinstance(self.share, Schedule):
            return f"{self.share.describe()} over {self.length}"
        return str(self.share)

    def _rows_of_all_ranks(self, trainer: Trainer) -> dict[str, int]:
        assert self._source is not None
        rows = dict(self._source.rows_read())
        counts = torch.tensor(list(rows.values()), dtype=torch.float64, device=trainer.strategy.root_device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        return {corpus: round(float(count)) for corpus, count in zip(rows, counts, strict=True)}
