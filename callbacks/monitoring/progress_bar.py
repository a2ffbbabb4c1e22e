"""A progress bar for runs that are counted in steps and go on from where they were."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from ... import UsageError
from ...lightning_compat import logs_now
from .line_bar import LineBar, is_terminal
from .throughput import Throughput


class StepProgressBar(TQDMProgressBar):
    """Shows completed optimizer steps of ``max_steps``, named after the data module's ``dataset``.

    Lightning's own bars count batches of an epoch and take a resumed run's remaining steps for all of them. Without
    ``max_steps`` this one is Lightning's.

    Beside the steps, the time left and what modules log with ``prog_bar=True`` stand the learning rate of the first
    group, tokens or samples a second where there is a :class:`~rewurst.callbacks.Throughput`, and the share of old data
    read where there is a :class:`~rewurst.callbacks.ReplayScheduler`: at the logging interval, when the host waits for
    the device anyway.

    In a file or a pipe each bar is whole lines, at most one every ``seconds_per_line`` for all bars together.

    Args:
        refresh_rate: Steps from one update to the next.
        seconds_per_line: Least time between two lines where the output is not a terminal.

    Raises:
        UsageError: ``seconds_per_line`` is below 0.
    """

    def __init__(self, refresh_rate: int = 1, seconds_per_line: float = 10.0) -> None:
        super().__init__(refresh_rate)
        if seconds_per_line < 0:
            raise UsageError(f"StepProgressBar: seconds_per_line {seconds_per_line} must be at least 0")
        self.seconds_per_line = seconds_per_line

    def init_sanity_tqdm(self) -> Tqdm:
        """Return the bar of the validation before training."""
        bar = self._lines(self.sanity_check_description, False)
        return super().init_sanity_tqdm() if bar is None else bar

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar of training."""
        bar = self._lines(self.train_description, True)
        return super().init_train_tqdm() if bar is None else bar

    def init_validation_tqdm(self) -> Tqdm:
        """Return the bar of a validation."""
        alone = self.trainer.state.fn == "validate"
        bar = self._lines(self.validation_description, alone)
        return super().init_validation_tqdm() if bar is None else bar

    def init_test_tqdm(self) -> Tqdm:
        """Return the bar of a test."""
        bar = self._lines(self.test_description, True)
        return super().init_test_tqdm() if bar is None else bar

    def init_predict_tqdm(self) -> Tqdm:
        """Return the bar of a prediction."""
        bar = self._lines(self.predict_description, True)
        return super().init_predict_tqdm() if bar is None else bar

    def _lines(self, description: str, stays: bool) -> LineBar | None:
        if is_terminal():
            return None
        shape = {"disable": self.is_disabled, "leave": stays, "bar_format": self.BAR_FORMAT}
        return LineBar(self.seconds_per_line, desc=description, file=sys.stdout, smoothing=0, **shape)

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Begins the bar where the run stands; a run resumed within an epoch has no other beginning."""
        super().on_train_start(trainer, *args)
        self._begin(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Lightning resets the bar here."""
        super().on_train_epoch_start(trainer, *args)
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if trainer.max_steps <= 0:
            return
        bar = self.train_progress_bar
        bar.total, bar.unit = trainer.max_steps, " steps"
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description(getattr(trainer.datamodule, "dataset", None) or "training")  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows the steps completed."""
        if trainer.max_steps <= 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif self._should_update(trainer.global_step, trainer.max_steps):
            bar = self.train_progress_bar
            bar.n = trainer.global_step
            if logs_now(trainer):  # reading a metric waits for the device
                bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.refresh()

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar, by short names."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if "train/loss" in metrics:
            metrics = {"loss": metrics.pop("train/loss")} | metrics
        rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
        if rate is not None:  # Adafactor may compute its own
            metrics["lr"] = f"{float(rate):.2e}"
        speeds = next((c.latest for c in trainer.callbacks if isinstance(c, Throughput)), {})  # type: ignore[attr-defined]
        for name in ("tokens", "samples"):
            if (speed := speeds.get(f"throughput/{name}_per_s")) is not None:
                metrics[f"{name}/s"] = f"{speed:.3g}" if speed < 1000 else f"{speed / 1000:.3g}k"
                break
        if (share := trainer.callback_metrics.get("replay/share_read")) is not None:
            metrics["old"] = f"{float(share):.1%}"
        return metrics
