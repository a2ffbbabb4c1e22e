"""Losses of every corpus relative to the start of a dataset: what a model forgets and learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from .. import UsageError
from ..hints import closest
from ..lightning_compat import logged_step, publish_metrics, validation_from_its_beginning


class Forgetting(Callback):
    """Validates at the start of a dataset and logs from then on how far each corpus has moved.

    Logs after every validation ``forgetting/<corpus>`` (loss now minus loss at the start) of old corpora,
    ``adaptation/<corpus>`` (loss at the start minus loss now) of new ones, and ``forgetting/average`` and
    ``adaptation/average``, which ``EarlyStopping`` and ``ModelCheckpoint`` can monitor. The starting losses are part of
    the checkpoint: a run that is stopped and resumed compares with the same start, and only another dataset (see
    :class:`~rewurst.callbacks.LRRewarming`) starts over.

    Works with every module that logs a named loss for each validation corpus.

    Args:
        old: Corpora learnt before.
        new: Corpora being learnt.
        metric: Name that the module logs a corpus's loss under.
        dataset: Name of what is being learnt, where the data module has no attribute ``dataset``.

    Raises:
        UsageError: No corpus is named, a corpus is both, or a loss is not logged.

    Example::

        Trainer(callbacks=[Forgetting(old=["prose"], new=["code"])])
    """

    def __init__(
        self,
        old: Sequence[str] = (),
        new: Sequence[str] = (),
        metric: str = "val/loss/{corpus}",
        dataset: str | None = None,
    ) -> None:
        both = sorted(set(old) & set(new))
        if both:
            raise UsageError(f"Forgetting: corpus {both[0]!r} is both old and new")
        if not old and not new:
            raise UsageError("Forgetting: name the corpora, such as old=['prose'], new=['code']")
        if "{corpus}" not in metric:
            raise UsageError(f"Forgetting: metric {metric!r} must hold {{corpus}}, as val/loss/{{corpus}} does")
        self.old, self.new, self.metric = list(old), list(new), metric
        self._argument = dataset
        self._dataset: str | None = None
        self._start: dict[str, float] = {}

    @property
    def start(self) -> dict[str, float]:
        """Loss of every corpus when the dataset began."""
        return dict(self._start)

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, so that there may be several of these callbacks."""
        return self._generate_state_key(old=self.old, new=self.new, metric=self.metric)

    @property
    def _legacy_state_key(self) -> Any:
        return type(self).__name__  # the key in checkpoints of before there could be several

    def state_dict(self) -> dict[str, Any]:
        """Return the dataset and the losses that it started with."""
        return {"dataset": self._dataset, "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the losses that the dataset started with."""
        self._dataset, self._start = state_dict["dataset"], state_dict["start"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the corpora are validated, and move before callbacks that monitor what this one computes."""
        if stage != "fit":
            return
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        validated = getattr(trainer.datamodule, "val", None)  # type: ignore[attr-defined]
        if not isinstance(validated, Mapping):
            return
        for corpus in (*self.old, *self.new):
            if corpus not in validated:
                raise UsageError(f"Forgetting: corpus {corpus!r} is not in val{closest(corpus, validated)}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate before the first step of a dataset."""
        of_data = getattr(trainer.datamodule, "dataset", None)  # type: ignore[attr-defined]
        dataset = of_data or self._argument or ""
        if dataset == self._dataset and self._start:
            return
        self._dataset, self._start = dataset, {}
        if not trainer.enable_validation:
            raise UsageError("Forgetting: the run validates nothing, so nothing can be compared")
        self._validate(trainer)
        found = ", ".join(f"{corpus} {loss:.4f}" for corpus, loss in self._start.items())
        rank_zero_info(f"dataset {dataset!r} begins with losses {found}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the first losses of a dataset, and log the distance of later ones."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        losses = {corpus: self._loss(trainer, corpus) for corpus in (*self.old, *self.new)}
        if not self._start:
            self._start = losses
        moved = {corpus: loss - self._start[corpus] for corpus, loss in losses.items()}
        metrics = {f"forgetting/{corpus}": moved[corpus] for corpus in self.old}
        metrics |= {f"adaptation/{corpus}": -moved[corpus] for corpus in self.new}
        for name, corpora, sign in (("forgetting", self.old, 1), ("adaptation", self.new, -1)):
            if corpora:
                metrics[f"{name}/average"] = sign * sum(moved[corpus] for corpus in corpora) / len(corpora)
        publish_metrics(trainer, metrics)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=logged_step(trainer))

    def _validate(self, trainer: Trainer) -> None:
        """Run a whole validation before the first step, as the training loop runs it between two."""
        with validation_from_its_beginning(trainer) as loop:
            loop.run()

    def _loss(self, trainer: Trainer, corpus: str) -> float:
        name = self.metric.format(corpus=corpus)
        if name not in trainer.callback_metrics:
            raise UsageError(f"Forgetting: the module logs no {name!r}{closest(name, trainer.callback_metrics)}")
        return float(trainer.callback_metrics[name])
