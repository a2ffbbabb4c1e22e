"""Modules and data of a foreign project that `rewurst plan` does not know."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


class Pictures(LightningDataModule):
    """Labeled pictures with an example batch."""

    def __init__(self, batch_size: int = 64, side: int = 64) -> None:
        super().__init__()
        self.batch_size, self.side = batch_size, side

    def example_batch(self, micro_batch_size: int) -> Pair:
        images = torch.zeros(micro_batch_size, 3, self.side, self.side)
        return images, torch.zeros(micro_batch_size, dtype=torch.long)


class Undescribed(LightningDataModule):
    """Data without an example batch."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size


class Classifier(LightningModule):
    """Module with automatic optimization, convolutions, and an encoder whose layers torch copies."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True), 2)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        states = self.encoder(self.convolutions(images).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(states.mean(1))
        return logits

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10)}


class Adversaries(LightningModule):
    """Module with manual optimization: two losses, two optimizers, two steps."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3 * 64 * 64, width), nn.ReLU(), nn.Linear(width, 3 * 64 * 64))
        self.judge = nn.Sequential(nn.Linear(3 * 64 * 64, width), nn.ReLU(), nn.Linear(width, 1))

    def losses(self, batch: Pair, judging: bool) -> Tensor:
        real = batch[0].flatten(1)
        fake = self.generator(real)
        if judging:
            of_fake, of_real = self.judge(torch.cat([fake.detach(), real])).chunk(2)
            return F.softplus(of_fake).mean() + F.softplus(-of_real).mean()
        return F.softplus(-self.judge(fake)).mean()

    def training_step(self, batch: Pair, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer, judging in zip(optimizers, (False, True), strict=True):
            loss = self.losses(batch, judging)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log(f"loss/{judging}", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), 0.1, momentum=0.9) for part in (self.generator, self.judge)]


class Curious(Classifier):
    """Module whose step needs values, which cannot be planned."""

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if loss.item() > 1 else loss


class Broken(Classifier):
    """Module whose step does not fit its data."""

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return super().training_step((batch[0][:, :2], batch[1]), batch_idx)
