"""A module that records the rows which TextDataModule gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from rewurst.callbacks import ReplayScheduler
from rewurst.datamodules import TextDataModule

Batch = dict[str, Tensor]


_QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}


class Reader(LightningModule):
    """Module that records the rows of every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rows: list[tuple[int, int]] = []
        self.tokens: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.rows += list(zip(batch["corpus"].tolist(), batch["row"].tolist(), strict=True))
        self.tokens.append(batch["input_ids"])
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    data: TextDataModule,
    steps: int,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    share: float = 0.3,
    **options: Any,
) -> Reader:
    module = Reader()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=options.pop("max_epochs", -1),
        callbacks=[*([ReplayScheduler(share)] if data.replay_corpora else []), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module
