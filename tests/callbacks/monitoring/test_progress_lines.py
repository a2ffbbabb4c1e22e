"""Progress in a file is a few whole lines for any number of steps and validations."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.callbacks import StepProgressBar
from rewurst.callbacks.monitoring import line_bar
from rewurst.callbacks.monitoring.line_bar import LineBar

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")


class Clock:
    """Clock that moves with each step."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Slow(LightningModule):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.weight, self.clock = nn.Parameter(torch.zeros(())), clock

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.clock.now += 1.0
        return self.weight * 1.0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.clock.now += 0.5

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.clock.now += 0.5

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(line_bar, "time", clock)
    monkeypatch.setattr(LineBar, "_written", float("-inf"))
    return clock


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("limit", [{"max_steps": 100}, {"max_epochs": 10}])
def test_the_number_of_lines_follows_the_time(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, terminal: bool, limit: dict[str, int]
) -> None:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False, enable_checkpointing=False, val_check_interval=2,
        callbacks=[StepProgressBar(seconds_per_line=20)], **limit,
    )  # fmt: skip
    loader: Any = DataLoader(torch.zeros(10, 1))
    trainer.fit(Slow(clock), loader, loader)
    seconds = clock.now
    assert seconds > 300
    text = out.getvalue()
    if terminal:
        assert "\r" in text
        return
    lines = text.splitlines()
    assert "\r" not in text
    assert seconds / 40 < len(lines) <= seconds / 20 + 2
    assert any("Validation" in line for line in lines)
    assert ("100/100" if "max_steps" in limit else "10/10") in lines[-1]
    trainer.test(trainer.lightning_module, loader, verbose=False)
    assert "10/10" in out.getvalue().splitlines()[-1]


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="seconds_per_line -1 must be at least 0"):
        StepProgressBar(seconds_per_line=-1)
