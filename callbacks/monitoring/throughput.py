"""Tokens, samples and FLOPs per second, the share of the device's peak, and how a run spends its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.throughput import Throughput as Window
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ... import UsageError
from ...lightning_compat import is_accumulating, log_metrics, logged_step, logs_now
from .stopwatch import PartProfiler, PartTimes, StepClock

PARTS = ("step", "data", "validation", "checkpoint")
ACTIONS = {"[_TrainingEpochLoop].train_dataloader_next": "data", "save_checkpoint": "checkpoint"}


class Throughput(ThroughputMonitor):
    """Callback like Lightning's ThroughputMonitor that never makes the host wait for the device.

    At the Trainer's logging interval it logs, over the steps since the last one and over all devices,
    ``throughput/samples_per_s``, ``throughput/tokens_per_s`` (predicted tokens, of batches with ``input_ids``),
    ``throughput/tflops_per_s``, ``throughput/seconds_per_step`` and ``throughput/mfu``, the model FLOP utilization:
    the FLOPs of the model's formula per second and device, over the device's peak in the run's precision. Validation
    and checkpointing are excluded. On CUDA, time is measured by events in the stream; steps that the device has not
    finished at a logging interval count in the next.

    It also logs, as shares of the host's time since the last interval, ``time/data`` (waiting for a batch),
    ``time/validation``, ``time/checkpoint`` and ``time/step`` (the rest), and at the end the shares of the whole run.
    ``time/data`` above 0 does not necessarily slow down a GPU, which has queued work in the meantime.

    FLOPs come from the module: ``flops(batch) -> float | None`` of a training step on a micro-batch, or Lightning's
    ``flops_per_batch``. Without either, or without a known peak (as on CPUs), there is no MFU.

    Args:
        batch_size_fn: Function that counts a batch's samples (default: the first dimension of its first tensor).
        length_fn: Function that counts a batch's tokens (default: those that ``input_ids`` (rows, length + 1) predict).
        peak_flops: Peak FLOPs per second of one device, if Lightning does not know it or to override it.
        window_size: Number of micro-batches that rates are averaged over (default: those of a logging interval).

    Raises:
        UsageError: A number is out of range.

    Example::

        Trainer(callbacks=[Throughput()], log_every_n_steps=50)
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int | None] | None = None,
        peak_flops: float | None = None,
        window_size: int | None = None,
    ) -> None:
        if (peak_flops is not None and peak_flops <= 0) or (window_size is not None and window_size < 1):
            raise UsageError(f"Throughput: peak_flops {peak_flops} and window_size {window_size} must be above 0")
        super().__init__(batch_size_fn or samples_in)
        self.tokens_fn: Callable[[Any], int | None] = length_fn or tokens_in
        self.peak_flops, self.window_size = peak_flops, window_size
        self.latest: dict[str, float] = {}
        self._parts = PartTimes(PARTS)
        self._logged: dict[str, float] = {}
        self._clock: StepClock | None = None
        self._window: Window | None = None
        self._totals = (0.0, 0, 0, 0)
        self._logged_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the device's peak, and observe the actions that the Trainer reports to its profiler."""
        if stage != "fit":
            return
        if self.peak_flops is None:
            super().setup(trainer, pl_module, stage)
        else:
            self.available_flops = int(self.peak_flops)
        run: Any = trainer
        if run.is_global_zero and not isinstance(run.profiler, PartProfiler):
            run.profiler = PartProfiler(run.profiler, self._begin_action, self._end_action)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the Trainer's profiler."""
        run: Any = trainer
        if isinstance(run.profiler, PartProfiler):
            run.profiler = run.profiler.inner

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same as ``teardown``, which Lightning does not call for a failed run."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the clocks."""
        if not trainer.is_global_zero:
            return
        interval = max(1, trainer.log_every_n_steps) * _accumulation(trainer)  # type: ignore[attr-defined]
        self._window = Window(
            self.available_flops, trainer.world_size, (self.window_size or interval) + 1, separator="/"
        )
        self._clock, self._logged_at = None, -1
        self._totals, self.latest = (0.0, 0, 0, 0), {}
        self._parts, self._logged = PartTimes(PARTS), dict.fromkeys(PARTS, 0.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the device's clock; time before the first step, such as a first validation, is excluded."""
        if self._clock is None and trainer.is_global_zero:
            self._clock = StepClock(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """End a micro-batch, and log at the interval."""
        if self._clock is None:
            return
        self._clock.lap((self.batch_size_fn(batch), self.tokens_fn(batch), _flops(pl_module, batch)))
        step = logged_step(trainer)
        if step != self._logged_at and logs_now(trainer) and not is_accumulating(trainer):
            self._accumulate()
            self._log(trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        """Pause the clocks."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._enter("validation")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Resume the clocks."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._leave()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Report how the time was spent."""
        seconds = self._parts.read()
        total = sum(seconds.values())
        if trainer.is_global_zero and total > 0:
            shares = ", ".join(f"{name} {value / total:.1%}" for name, value in seconds.items())
            rank_zero_info(f"time of {total:.0f} s: {shares}")

    def _start(self, *_: Any) -> None:
        """Skip Lightning's measurements in validation, test and prediction, which wait for the device."""

    _update = _compute = _start  # type: ignore[assignment]

    def _begin_action(self, action: str) -> None:
        if action in ACTIONS:
            self._enter(ACTIONS[action])

    def _end_action(self, action: str) -> None:
        if action in ACTIONS:
            self._leave()

    def _enter(self, part: str) -> None:
        self._parts.enter(part)
        if self._clock is not None and part != "data":
            self._clock.pause()

    def _leave(self) -> None:
        self._parts.leave()
        if self._clock is not None and self._parts.depth == 0:
            self._clock.resume()

    def _accumulate(self) -> None:
        """Add the steps that the device has finished to the window for the rates."""
        assert self._clock is not None
        assert self._window is not None
        for seconds, (samples, tokens, flops) in self._clock.passed():
            if not self._window._time:  # rates are between the window's first and last entry
                self._update_window(0, None if tokens is None else 0, None if flops is None else 0)
            elapsed, batches, all_samples, all_tokens = self._totals
            seconds = max(seconds, 1e-9)  # the window needs increasing times, but clocks may be coarse
            self._totals = (elapsed + seconds, batches + 1, all_samples + samples, all_tokens + (tokens or 0))
            self._update_window(samples, tokens, flops)

    def _update_window(self, samples: int, tokens: int | None, flops: float | None) -> None:
        elapsed, batches, all_samples, all_tokens = self._totals
        assert self._window is not None
        self._window.update(
            time=elapsed,
            batches=batches,
            samples=all_samples,
            lengths=None if tokens is None else all_tokens,
            flops=None if flops is None else int(flops),
        )

    def _log(self, trainer: Trainer) -> None:
        """Log the rates, if the window is full, and the shares of time."""
        assert self._window is not None
        metrics = self._time_shares()
        if self._window._time:
            rates, devices = self._window.compute(), trainer.world_size
            for name, key, factor in (
                ("samples_per_s", "samples_per_sec", devices),
                ("tokens_per_s", "items_per_sec", devices),
                ("tflops_per_s", "flops_per_sec", devices / 1e12),
                ("mfu", "mfu", 1),
            ):
                if (value := rates.get(f"device/{key}")) is not None:
                    metrics[f"throughput/{name}"] = value * factor
            if (speed := rates.get("device/batches_per_sec")) is not None:
                metrics["throughput/seconds_per_step"] = _accumulation(trainer) / speed
        self.latest, self._logged_at = metrics, logged_step(trainer)
        log_metrics(trainer, metrics)

    def _time_shares(self) -> dict[str, float]:
        seconds = self._parts.read()
        since = {name: value - self._logged[name] for name, value in seconds.items()}
        self._logged, total = seconds, sum(since.values())
        return {f"time/{name}": value / total for name, value in since.items()} if total > 0 else {}


def samples_in(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor."""
    return _first_length(batch) or 1


def _first_length(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((count for part in parts if (count := _first_length(part)) is not None), None)


def tokens_in(batch: Any) -> int | None:
    """Return the number of tokens that rows of a batch's ``input_ids`` predict, or None without such rows."""
    rows = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return rows.shape[0] * (rows.shape[1] - 1) if isinstance(rows, Tensor) else None


def _accumulation(trainer: Trainer) -> int:
    """Return the number of micro-batches per global batch; with manual optimization Lightning assumes one."""
    return int(getattr(trainer.datamodule, "accumulation", None) or trainer.accumulate_grad_batches)  # type: ignore[attr-defined]


def _flops(pl_module: LightningModule, batch: Any) -> float | None:
    count = getattr(pl_module, "flops", None)
    return count(batch) if callable(count) else getattr(pl_module, "flops_per_batch", None)
