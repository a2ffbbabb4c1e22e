"""Modules of other projects, and the learning rates of their optimizers' steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rewurst.callbacks import (
    InfiniteCosine,
    Schedule,
    WarmupCosine,
)

COSINE = WarmupCosine(1e-2, 1e-3, 0.1)


INFINITE = InfiniteCosine(1e-2, 5e-3, 1e-3, 0.1, 0.5, 0.8)


class Recording(torch.optim.AdamW):
    """AdamW that records the learning rates of its steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used: list[list[float]] = []

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        result = super().step(closure)
        # Lightning's closure, run by super().step, is where hooks before the step are called.
        self.used.append([float(group["lr"]) for group in self.param_groups])
        return result


class Foreign(LightningModule):
    """Foreign module with automatic optimization."""

    def __init__(self, scheduler: bool = False, tensor_lr: bool = False, second_lr: float = 1e-3) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.scheduler, self.tensor_lr, self.second_lr = scheduler, tensor_lr, second_lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        lr = torch.tensor(1e-3) if self.tensor_lr else 1e-3
        groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": self.second_lr}]
        optimizer = Recording(groups, lr=lr)
        if self.scheduler:
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)]
        return optimizer


class ManualGAN(LightningModule):
    """Foreign module with two manual optimizers and its own accumulation."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d, self.accumulate = nn.Linear(2, 1), nn.Linear(2, 1), accumulate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for network, optimizer in zip((self.g, self.d), self.optimizers(), strict=True):  # type: ignore[arg-type]
            self.manual_backward(network(batch[0]).square().mean())
            if (batch_idx + 1) % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return Recording(self.g.parameters(), lr=1e-4), Recording(self.d.parameters(), lr=4e-4)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4096, 2)))


def fit(
    module: LightningModule,
    callbacks: list[Callback],
    max_steps: int,
    ckpt_path: Path | None = None,
    accumulate: int = 1,
    **options: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def used(trainer: Trainer, group: int = 0, optimizer: int = 0) -> list[float]:
    return [lrs[group] for lrs in trainer.optimizers[optimizer].used]  # type: ignore[attr-defined]


def expected(schedule: Schedule, length: int, steps: range) -> list[float]:
    return [schedule.value(step, length) for step in steps]
