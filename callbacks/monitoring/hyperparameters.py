"""Settings and final metrics in TensorBoard's HParams tab."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from ..forgetting import Forgetting
from ..learning_rate.rewarming import LRRewarming
from ..replay import ReplayScheduler

METRICS = ("val/loss/", "val/psnr/")


class LogHyperparameters(Callback):
    """Callback that logs a run's settings and the metrics of its last validation to TensorBoard's HParams tab.

    The row belongs to the run's own folder, not to a subfolder as with ``SummaryWriter.add_hparams``. It shows the
    latest values of metrics that are logged anyway: ``val/loss/*``, ``val/psnr/*``, and those of ``Forgetting``. It is
    written at the first validation, so that runs that are killed later have one too.

    Settings are the dataset, steps, schedule and replay share, batch and optimizer, number of parameters, and those
    that the module and data module saved with ``save_hyperparameters()``. Give such a run a
    ``TensorBoardLogger(default_hp_metric=False)``, because Lightning otherwise writes a row without metrics. Other
    loggers get the settings through ``log_hyperparams``.

    Args:
        settings: Additional settings, by name.

    Example::

        Trainer(callbacks=[LogHyperparameters({"machine": "two cores"})])
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.settings = dict(settings or {})
        self._end: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a row."""
        self._end = None
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self.collect(trainer, pl_module))
            elif logger.hparams and getattr(logger, "_default_hp_metric", False):
                rank_zero_warn(
                    "LogHyperparameters: Lightning has written a row of hyperparameters without metrics; give "
                    "TensorBoardLogger default_hp_metric=False"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row, once."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._end is None:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that the run has finished."""
        if self._end is None:
            self._write(trainer, pl_module)
        for writer in _writers(trainer):
            writer.add_summary(self._end)

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, bool | int | float | str]:
        """Return the settings by name."""
        found: dict[str, Any] = {}
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for part in (pl_module, data):
            found |= getattr(part, "hparams", {}) or {}
        for name in ("dataset", "global_batch_size", "micro_batch_size", "sequence_length", "image_size", "seed"):
            found[name] = getattr(data, name, None)
        found["parameters"] = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        for name in ("max_steps", "precision", "world_size"):
            found[name] = getattr(trainer, name)
        for optimizer in trainer.optimizers[:1]:
            found["optimizer"] = type(optimizer).__name__
            found["weight_decay"] = optimizer.defaults.get("weight_decay")
        found["replay_share"] = "0"  # TensorBoard takes its columns from the first run that it finds
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LRRewarming):
                run = callback.run
                found |= {
                    "schedule": type(run.schedule).__name__,
                    "schedule_length": run.length,
                    "start_step": run.start,
                }
                found |= {"optimizer_state": callback.optimizer_state, **run.schedule.numbers()}
            elif isinstance(callback, ReplayScheduler):
                found["replay_share"] = callback.state_dict()["share"]
        found |= self.settings
        return {name: _plain(value) for name, value in found.items() if value is not None}

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name for name in trainer.callback_metrics if name.startswith(METRICS)}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Forgetting):
                metrics |= {f"forgetting/{corpus}" for corpus in callback.old}
                metrics |= {f"adaptation/{corpus}" for corpus in callback.new}
        shown = dict.fromkeys(sorted(metrics) or ["train/loss"], 0.0)  # only the names matter; values come from curves
        from torch.utils.tensorboard.summary import hparams  # TensorBoard is imported only if used

        settings = self.collect(trainer, pl_module)
        experiment, start, self._end = hparams(settings, shown)  # type: ignore[no-untyped-call]
        for writer in _writers(trainer):
            writer.add_summary(experiment)
            writer.add_summary(start)


def _writers(trainer: Trainer) -> list[Any]:
    if not trainer.is_global_zero:
        return []
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment._get_file_writer() for logger in loggers]


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
