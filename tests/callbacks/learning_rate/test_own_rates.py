"""Optimizers that compute their own learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.callbacks import LRRewarming, StepProgressBar, WarmupCosine


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        from transformers import Adafactor

        return Adafactor(self.parameters(), lr=None, relative_step=True)


def fit(callback: Any) -> Trainer:
    trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, callbacks=[callback],
                      enable_model_summary=False)  # fmt: skip
    trainer.fit(Line(), DataLoader(torch.randn(4, 2), batch_size=2))
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_adafactor_with_its_own_rate() -> None:
    assert fit(StepProgressBar()).global_step == 2
    with pytest.raises(UsageError, match="Adafactor has lr None, so it computes its own learning rate: give it"):
        fit(LRRewarming(WarmupCosine(1e-3, 1e-4), 2, dataset="a"))
