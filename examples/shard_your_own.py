"""Shard a module of your own project over processes: one line, and nothing of it in the module.

Two processes train a transformer of PyTorch's own layers, save folders of shards, and resume from one of them:
run ``python examples/shard_your_own.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rewurst.callbacks  # noqa: F401  # makes the strategy's name known


class Sorting(LightningModule):
    """Learns which of the numbers in a row is the largest. Nothing in here knows rewurst or sharding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embedding = nn.Linear(1, 32)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 1)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        scores = self.head(self.encoder(self.embedding(batch[0][..., None])))[..., 0]
        loss = nn.functional.cross_entropy(scores, batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def loader() -> DataLoader[Any]:
    rows = torch.rand(2000, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(rows, rows.argmax(1)), batch_size=20)


def trainer(folder: Path, max_steps: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy="rewurst.callbacks.FSDP",  # the line
        max_steps=max_steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=20, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(folder: Path) -> None:
    seed_everything(0)
    module = Sorting()
    trainer(folder, max_steps=40).fit(module, loader())
    again = Sorting()
    after = trainer(folder, max_steps=60)
    after.fit(again, loader(), ckpt_path=folder / "step=40.ckpt")
    if after.is_global_zero:
        print(f"{len(module.losses)} steps: {module.losses[0]:.2f} -> {module.losses[-1]:.2f}")
        print(f"{len(again.losses)} more: {again.losses[0]:.2f} -> {again.losses[-1]:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/shard_your_own"))
