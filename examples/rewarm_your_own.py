"""Re-warm a checkpoint of your own project: your module, your checkpoint, three lines of rewurst.

The module has its own CosineAnnealingLR, which ran to its end. Restored as it is, the run would continue at a learning
rate of 0. ``LRRewarming`` re-warms it for the new data: run ``python examples/rewarm_your_own.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rewurst.callbacks import LRRewarming, WarmupCosine  # 1


class Regression(LightningModule):
    """A module that does not use rewurst."""

    def __init__(self, own_schedule: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.own_schedule = own_schedule
        self.rates: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss: Tensor = (self.layer(batch[0]) - batch[1]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if not self.own_schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(slope: float) -> DataLoader[Any]:
    x = torch.randn(800, 4)
    return DataLoader(TensorDataset(x, slope * x.sum(1, keepdim=True)), batch_size=8)


def trainer(folder: Path, max_steps: int, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def main(folder: Path) -> None:
    before = trainer(folder, max_steps=50)
    before.fit(Regression(own_schedule=True), loader(slope=1.0))
    before.save_checkpoint(folder / "before.ckpt")

    module = Regression(own_schedule=False)
    rewarming = LRRewarming(WarmupCosine(peak=1e-2, minimum=1e-3, warmup=0.1), length=100, dataset="steeper")  # 2
    after = trainer(folder, max_steps=150, callbacks=[rewarming])  # 3
    after.fit(module, loader(slope=2.0), ckpt_path=folder / "before.ckpt")
    print(f"began at step {rewarming.run.start}: {module.rates[0]:g} -> {max(module.rates):g} -> {module.rates[-1]:g}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/rewarm_your_own"))
