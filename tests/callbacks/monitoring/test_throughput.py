"""Rates and shares of time on a simulated clock, and CUDA events without a device."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler
from stage_runs import column, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.callbacks import StepProgressBar, Throughput
from rewurst.callbacks.monitoring import stopwatch
from rewurst.callbacks.monitoring.stopwatch import PartTimes, StepClock
from rewurst.callbacks.monitoring.throughput import samples_in, tokens_in

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*", "ignore:.*exists and is not empty")


class Clock:
    """Clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", types.SimpleNamespace(perf_counter=clock))
    return clock


class Rows:
    """Batches of two rows with eight predicted tokens each; reading one takes a second."""

    def __init__(self, clock: Clock, count: int = 100) -> None:
        self.clock, self.count = clock, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.count:
            raise IndexError(index)
        self.clock.spend(1)
        return {"input_ids": torch.zeros(2, 9, dtype=torch.long)}


class Module(LightningModule):
    """Module whose step takes three seconds, validation ten, checkpoint four; 6e12 FLOPs per micro-batch."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.weight = clock, nn.Parameter(torch.zeros(()))

    def flops(self, batch: Any) -> float:
        return 6e12

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.spend(3)
        self.log("train/loss", 2.5, prog_bar=True)
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.spend(10)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.spend(4)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(clock: Clock, count: int = 100) -> Any:
    return DataLoader(Rows(clock, count), batch_size=None)  # type: ignore[arg-type]


def run(folder: Path, clock: Clock, callback: Throughput, *others: Any, **options: Any) -> Trainer:
    trained = trainer(folder, callbacks=[callback, *others], **{"max_steps": 8, "log_every_n_steps": 4, **options})
    trained.fit(Module(clock), loader(clock), loader(clock, 1))
    return trained


def test_rates_leave_validation_and_checkpoints_out(clock: Clock, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    done = run(
        tmp_path, clock, Throughput(peak_flops=2e12), saving, val_check_interval=2, limit_val_batches=1.0, max_steps=9
    )
    a_step = [15 / 4, 4]  # seconds; the clock starts with the first batch there
    assert column(done.logger, "throughput/seconds_per_step") == a_step
    assert column(done.logger, "throughput/tokens_per_s") == pytest.approx([16 / seconds for seconds in a_step])
    assert column(done.logger, "throughput/samples_per_s") == pytest.approx([2 / seconds for seconds in a_step])
    assert column(done.logger, "throughput/tflops_per_s") == pytest.approx([6 / seconds for seconds in a_step])
    assert column(done.logger, "throughput/mfu") == pytest.approx([6 / 2 / seconds for seconds in a_step])


def test_shares_of_time(clock: Clock, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    done = run(tmp_path, clock, Throughput(), saving, val_check_interval=2, limit_val_batches=1.0)
    # Four steps: each waits a second and computes three; a validation after the second reads a batch for one more;
    # a checkpoint after the third. Then the validation after the fourth, and so on.
    first, second = 4 + 12 + 11 + 4, 4 + 12 + 2 * 11 + 4
    for part, seconds in (("data", (4, 4)), ("step", (12, 12)), ("validation", (11, 22)), ("checkpoint", (4, 4))):
        expected = [seconds[0] / first, seconds[1] / second]
        assert column(done.logger, f"time/{part}") == pytest.approx(expected), part


def test_accumulation_counts_global_batches(clock: Clock, tmp_path: Path) -> None:
    done = run(tmp_path, clock, Throughput(), accumulate_grad_batches=2)
    assert column(done.logger, "throughput/seconds_per_step") == [31 / 4, 8]
    assert column(done.logger, "throughput/tokens_per_s") == [8 * 16 / 31, 4]


def test_a_cpu_has_no_known_peak(clock: Clock, tmp_path: Path) -> None:
    done = run(tmp_path, clock, Throughput())
    names = {name for name in done.logged_metrics if name.startswith("throughput/")}
    assert names == {
        f"throughput/{name}" for name in ("samples_per_s", "tokens_per_s", "tflops_per_s", "seconds_per_step")
    }


def test_other_stages_measure_nothing(clock: Clock, tmp_path: Path) -> None:
    evaluating = trainer(tmp_path, callbacks=[Throughput()], limit_val_batches=1.0)
    evaluating.validate(Module(clock), loader(clock, 2), verbose=False)
    assert not any(name.startswith(("throughput", "time")) for name in evaluating.logged_metrics)


def test_the_trainers_profiler_keeps_working_and_is_restored(clock: Clock, tmp_path: Path) -> None:
    profiler = SimpleProfiler()
    done = run(tmp_path, clock, Throughput(), profiler=profiler)
    assert done.profiler is profiler  # type: ignore[attr-defined]

    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("on purpose")

    failing = trainer(tmp_path, callbacks=[Throughput()], max_steps=2)
    before = failing.profiler  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="on purpose"):
        failing.fit(Fails(clock), loader(clock), loader(clock))
    assert failing.profiler is before  # type: ignore[attr-defined]
    assert len(profiler.recorded_durations["run_training_batch"]) == 8


def test_the_bar_shows_loss_rate_speed_and_share(clock: Clock, tmp_path: Path) -> None:
    class Bar(StepProgressBar):
        shown: dict[str, Any]

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_batch_end(*args, **kwargs)
            type(self).shown = dict(self.get_metrics(args[0], args[1]))

    class Replays(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("replay/share_read", 0.0512)
            return super().training_step(batch, batch_idx)

    bar = Bar()
    trained = trainer(
        tmp_path, callbacks=[Throughput(), bar], enable_progress_bar=True, max_steps=4, log_every_n_steps=2
    )
    trained.fit(Replays(clock), loader(clock), loader(clock))
    assert bar.shown == {"loss": 2.5, "lr": "1.00e-01", "tokens/s": "4", "old": "5.1%"}


class Event:
    """Event of a stream that has reached ``Event.device``; times are the order of recording, in seconds."""

    recorded = 0.0
    device = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        Event.recorded += 1
        self.at = Event.recorded

    def query(self) -> bool:
        return self.at <= Event.device

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "PyTorch raises here"
        return 1000 * (end.at - self.at)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the host waits for the device"))
    Event.recorded = Event.device = 0.0


@pytest.mark.usefixtures("cuda")
def test_steps_on_cuda_count_when_the_device_has_finished_them() -> None:
    clock = StepClock(torch.device("cuda"))  # event 1
    clock.lap("a")  # 2
    clock.lap("b")  # 3
    clock.pause()  # 4
    Event.recorded += 10
    clock.resume()  # 15
    clock.lap("c")  # 16
    assert clock.passed() == []
    Event.device = 3
    assert clock.passed() == [(1, "a"), (1, "b")]
    Event.device = 15
    assert clock.passed() == []
    Event.device = 16
    assert clock.passed() == [(2, "c")], "one second before the pause and one after it"


def test_a_part_within_another_counts_once(clock: Clock) -> None:
    parts = PartTimes(("step", "data", "validation", "checkpoint"))
    for action in (3, "validation", 5, "checkpoint", 7, None, 1, None, 2):
        if isinstance(action, str):
            parts.enter(action)
        elif action is None:
            parts.leave()
        else:
            clock.spend(action)
    assert parts.read() == {"step": 5, "data": 0, "validation": 6, "checkpoint": 7}


def test_sizes_of_batches() -> None:
    rows = torch.zeros(3, 9)
    assert [samples_in(batch) for batch in ({"caption": ["a"], "image": rows}, [rows, 1], rows, "none")] == [3, 3, 3, 1]
    assert tokens_in({"input_ids": rows}) == 24
    assert tokens_in({"image": rows}) is None
    assert tokens_in([rows]) is None


@pytest.mark.parametrize("wrong", [{"peak_flops": 0}, {"window_size": 0}])
def test_bad_use(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be above 0"):
        Throughput(**wrong)


def test_without_a_count_there_are_no_flops(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Module, "flops")
    count: Callable[..., Any] = run(tmp_path, clock, Throughput(peak_flops=1e12)).logged_metrics.__contains__
    assert count("throughput/tokens_per_s")
    assert not count("throughput/mfu")
