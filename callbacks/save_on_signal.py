"""A checkpoint when the machine is about to be taken away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .. import UsageError
from ..checkpoints.runs import run_folder
from ..lightning_compat import stop_now
from .optimizer_steps import StepCallback


class SaveOnSignal(StepCallback):
    """Save at the end of the global batch and stop, when the process is sent SIGTERM or SIGUSR1.

    The handler only sets a flag: Lightning's own for SLURM saves within the handler, in the middle of whatever was
    being computed. The run ends without another validation, with exit status 0; ``--ckpt_path auto`` resumes from the
    file, and the next checkpoint of the resumed run replaces it. Every process of a run has to be sent the signal, or
    any one of them: they agree. If a module's optimizer steps cannot be seen, the run stops at the end of the batch.

    Args:
        signals: Names of the signals.
        filename: Name of the checkpoint, in the folder of the first ``ModelCheckpoint``, or of the trainer.

    Raises:
        UsageError: There is no such signal.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1"), filename: str = "signal.ckpt") -> None:
        for name in signals:
            if not name.startswith("SIG") or not hasattr(signal, name):
                raise UsageError(f"there is no signal {name!r}: SIGTERM and SIGUSR1 are two that exist")
        self.signals = [getattr(signal, name) for name in signals]
        self.filename = filename
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        self._resumed_from: Path | None = None
        self._has_saved = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, after Lightning has set its handlers."""
        super().on_train_start(trainer, pl_module)
        self._received, self._has_saved = None, False
        path = trainer.ckpt_path
        self._resumed_from = Path(path) if path is not None and Path(path).name == self.filename else None
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("SaveOnSignal: only a program's main thread can take signals, so it saves on none")
            return
        for number in self.signals:
            self._before[number] = signal.signal(number, self._remember)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remove the checkpoint that the run resumed from, once there is a later one."""
        if self._has_saved and self._resumed_from is not None:
            trainer.strategy.remove_checkpoint(self._resumed_from)
            self._resumed_from = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that there is a checkpoint that a run can resume from."""
        self._has_saved = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save and stop if a global batch is complete and any process was sent a signal."""
        complete = self.take_stepped() or not (self._ever_stepped or pl_module.automatic_optimization)
        received = self._received is not None
        if not complete or not trainer.strategy.reduce_boolean_decision(received, all=False):
            return
        path = self._folder(trainer) / self.filename
        trainer.save_checkpoint(path)
        stop_now(trainer)
        rank_zero_info(f"stopped by a signal at step {trainer.global_step}: {path}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back, before Lightning does."""
        super().on_train_end(trainer, pl_module)
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back after an error."""
        super().on_exception(trainer, pl_module, exception)
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _folder(self, trainer: Trainer) -> Path:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                return Path(callback.dirpath)
        return (run_folder(trainer) or Path(trainer.default_root_dir)) / "checkpoints"
