"""A foreign project with torchdata's loader, dropout and validation resumes bit for bit at every step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from rewurst.callbacks import ExactResume

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty", "ignore:The dirpath has changed", "ignore:.set_vital' is deprecated"
)


class Noise(Dataset[Tensor]):
    """Dataset that augments in the reading process, from the global generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), float(index)) + torch.rand(4)


class Dropped(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean() * random.random()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.net(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(folder: Path, ckpt_path: Path | None, seed: int, every: int, shuffle: bool, at_end: bool) -> Dropped:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(0 if ckpt_path is None else seed)
    module = Dropped()
    torch.manual_seed(seed)
    save = ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=0 if at_end else 1,
        every_n_epochs=1 if at_end else 0, save_on_train_epoch_end=False if at_end else None,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_steps=13, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ExactResume(), save], val_check_interval=every, num_sanity_val_steps=2 if seed else 0,
    )  # fmt: skip
    train: Any = StatefulDataLoader(Noise(), batch_size=2, shuffle=shuffle)
    trainer.fit(module, train, DataLoader(Noise(), batch_size=5), ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("at_end", [False, True], ids=["saved after batches", "saved after validations"])
def test_every_step_resumes_bit_for_bit(tmp_path: Path, shuffle: bool, every: int, at_end: bool) -> None:
    whole = fit(tmp_path / "whole", None, 0, every, shuffle, at_end)
    wrong = []
    for path in sorted((tmp_path / "whole").glob("*.ckpt")):
        resumed = fit(tmp_path / path.stem, path, 7, every, shuffle, at_end)
        if not all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)):
            wrong.append(path.stem)
    assert not wrong
