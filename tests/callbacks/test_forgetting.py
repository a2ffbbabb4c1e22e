"""Forgetting compares with the exact start of a dataset, also after a restore and with foreign modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.callbacks import Forgetting


class Drifting(LightningModule):
    """Foreign module whose losses are known functions of the step."""

    def __init__(self, name: str = "val/loss/") -> None:
        super().__init__()
        self.step = nn.Parameter(torch.zeros(()))
        self.name = name
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.step  # SGD with a learning rate of 1 makes it count steps

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append((dataloader_idx, batch_idx))

    def on_validation_epoch_end(self) -> None:
        assert self.trainer.sanity_checking or self.seen == [(loader, batch) for loader in (0, 1) for batch in range(3)]
        self.seen = []
        self.log(f"{self.name}prose", 2.0 + 0.5 * self.step.detach())
        self.log(f"{self.name}wiki", 1.0 + 0.25 * self.step.detach())
        self.log(f"{self.name}code", 4.0 - 0.25 * self.step.detach())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(
    folder: Path, steps: int, callback: Forgetting, ckpt_path: Path | None = None, **options: Any
) -> list[dict[str, str]]:
    logger = CSVLogger(folder)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=logger, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=2, check_val_every_n_epoch=None, log_every_n_steps=1,
        callbacks=[callback, ModelCheckpoint(folder / f"to{steps}", "{step}", every_n_train_steps=1, save_top_k=-1)],
        **options,
    )  # fmt: skip
    trainer.fit(Drifting(), *loaders(), ckpt_path=ckpt_path, weights_only=True)
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def loaders() -> tuple[DataLoader[Tensor], list[DataLoader[Tensor]]]:
    """Return training batches and two validation loaders of three batches."""
    train: Any = [torch.zeros(1)] * 100
    return DataLoader(train), [DataLoader(train[:3]), DataLoader(train[:3])]


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    values = {int(row["step"]): float(row[name]) for row in rows if row.get(name)}
    return [value for _, value in sorted(values.items())]


pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*", "ignore:The dirpath has changed")


def callback(dataset: str = "code") -> Forgetting:
    return Forgetting(old=["prose", "wiki"], new=["code"], dataset=dataset)


def test_distances_from_the_start(tmp_path: Path) -> None:
    rows = fit(tmp_path, 4, callback())
    assert column(rows, "forgetting/prose") == [0.0, 1.0, 2.0]
    assert column(rows, "forgetting/wiki") == [0.0, 0.5, 1.0]
    assert column(rows, "forgetting/average") == [0.0, 0.75, 1.5]
    assert column(rows, "adaptation/code") == column(rows, "adaptation/average") == [0.0, 0.5, 1.0]


def test_the_start_stays_that_of_the_dataset(tmp_path: Path) -> None:
    fit(tmp_path, 4, callback())
    again = callback()
    rows = fit(tmp_path, 8, again, tmp_path / "to4" / "step=3.ckpt")
    assert again.start == {"prose": 2.0, "wiki": 1.0, "code": 4.0}
    assert column(rows, "forgetting/prose")[-1] == 4.0

    other = callback("rust")
    rows = fit(tmp_path, 9, other, tmp_path / "to4" / "step=4.ckpt")
    assert other.start == {"prose": 4.0, "wiki": 2.0, "code": 3.0}
    assert column(rows, "forgetting/prose") == [0.0, 1.0, 2.0]


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    class Rows(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, bool]] = []

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            self.seen.append((batch_idx, trainer.global_step, module.training))

    seen = []
    for callbacks in ([callback()], []):
        rows = Rows()
        trainer = Trainer(
            accelerator="cpu", max_steps=5, max_epochs=-1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, val_check_interval=2, check_val_every_n_epoch=None, enable_checkpointing=False,
            callbacks=[*callbacks, rows],
        )  # fmt: skip
        trainer.fit(Drifting(), *loaders())
        seen.append(rows.seen)
    assert seen[0] == seen[1] == [(step, step, True) for step in range(5)]


def test_bad_input(tmp_path: Path) -> None:
    for build, message in (
        (lambda: Forgetting(["a"], ["a"]), "corpus 'a' is both old and new"),
        (lambda: Forgetting(), "name the corpora"),
        (lambda: Forgetting(["a"], metric="val/loss"), "metric 'val/loss' must hold {corpus}"),
        (lambda: fit(tmp_path, 2, Forgetting(["pros"])), "logs no 'val/loss/pros'; did you mean 'val/loss/prose'?"),
        (lambda: fit(tmp_path, 2, callback(), limit_val_batches=0), "the run validates nothing"),
    ):
        with pytest.raises(UsageError) as error:
            build()
        assert message in str(error.value)
        assert "\n" not in str(error.value)
