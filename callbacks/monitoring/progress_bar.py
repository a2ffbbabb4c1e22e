"""Progress bar that counts steps and shows resumed runs correctly."""

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
    """Progress bar of completed optimizer steps out of ``max_steps``, named after the data module's ``dataset``.

    Lightning's own bars count batches per epoch and show a resumed run's remaining steps as its total. Without
    ``max_steps`` this bar is the same as Lightning's.

    Besides the steps, the time left and values that modules log with ``prog_bar=True``, it shows the learning rate of
    the first group, tokens or samples per second with :class:`~rewurst.callbacks.Throughput`, and the replay share of
    rows read with :class:`~rewurst.callbacks.ReplayScheduler`. These change at the logging interval, when the host
    waits for the device anyway.

    In a file or pipe it writes whole lines, at most one per ``seconds_per_line`` for all bars together.

    Args:
        refresh_rate: Number of steps between updates.
        seconds_per_line: Minimum time in seconds between two lines if the output is not a terminal.

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
        """Start the bar at the run's step; a run resumed within an epoch calls no other hook for this."""
        super().on_train_start(trainer, *args)
        self._begin(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Restore the bar, which Lightning resets here."""
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
        """Show the number of completed steps."""
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
        """Return the values shown after the bar, by short names."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if "train/loss" in metrics:
            metrics = {"loss": metrics.pop("train/loss")} | metrics
        rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
        if rate is not None:  # Adafactor may compute its own rate
            metrics["lr"] = f"{float(rate):.2e}"
        speeds = next((c.latest for c in trainer.callbacks if isinstance(c, Throughput)), {})  # type: ignore[attr-defined]
        for name in ("tokens", "samples"):
            if (speed := speeds.get(f"throughput/{name}_per_s")) is not None:
                metrics[f"{name}/s"] = f"{speed:.3g}" if speed < 1000 else f"{speed / 1000:.3g}k"
                break
        if (share := trainer.callback_metrics.get("replay/share_read")) is not None:
            metrics["old"] = f"{float(share):.1%}"
        return metrics
