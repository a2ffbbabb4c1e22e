"""A checkpoint when the machine is about to be taken away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from .. import UsageError
from ..checkpoints.runs import run_folder


class SaveOnSignal(Callback):
    """Saves at the end of the global batch and stops, when the process is sent SIGTERM or SIGUSR1.

    The handler only sets a flag: Lightning's own for SLURM saves within the handler, in the middle of whatever was
    being computed. The run ends as one that has reached its last step does, with exit status 0; ``--ckpt_path auto``
    goes on from the file. Every process of a run has to be sent the signal, or any one of them: they agree.

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
        self._stepped = False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over, after Lightning has set its handlers."""
        self._received = None
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("SaveOnSignal: only a program's main thread can take signals, so it saves on none")
            return
        for number in self.signals:
            self._before[number] = signal.signal(number, self._remember)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The global batch is complete with this micro-batch."""
        self._stepped = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Saves and stops where a global batch is complete and any process was sent a signal."""
        stepped, self._stepped = self._stepped, False
        received = self._received is not None
        if not stepped or not trainer.strategy.reduce_boolean_decision(received, all=False):
            return
        path = self._folder(trainer) / self.filename
        trainer.save_checkpoint(path)
        trainer.should_stop = True
        rank_zero_info(f"stopped by a signal at step {trainer.global_step}: {path}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back, before Lightning does."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back after an error."""
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
