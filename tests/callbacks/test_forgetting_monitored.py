"""Other callbacks can monitor Forgetting, and a corpus that is never validated is noticed at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.callbacks import Forgetting
from rewurst.datamodules import TextDataModule
from rewurst.datamodules.base import Corpus

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")


class Drifting(LightningModule):
    """Module whose loss on the old corpus rises by one per step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss/prose", float(self.steps), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(*callbacks: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=20, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, val_check_interval=2, num_sanity_val_steps=0, callbacks=list(callbacks),
    )  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
def test_a_run_stops_when_it_forgets_too_much(first: bool) -> None:
    stop = EarlyStopping("forgetting/prose", divergence_threshold=5.0, patience=100, check_on_train_epoch_end=False)
    forgetting, module = Forgetting(old=["prose"]), Drifting()
    trainer = trainer_of(*((forgetting, stop) if first else (stop, forgetting)))
    loader: Any = DataLoader(torch.zeros(40, 1))
    trainer.fit(module, loader, DataLoader(torch.zeros(1, 1)))  # type: ignore[arg-type]
    assert trainer.global_step == 6
    assert float(trainer.callback_metrics["forgetting/average"]) == 6.0


def test_a_corpus_that_is_not_validated_is_noticed_before_anything_runs(write_corpus: Any) -> None:
    path = write_corpus("prose")
    data = TextDataModule("prose", {"prose": Corpus(path)}, {"prose": path}, 8, 5, 5)
    module = Drifting()
    with pytest.raises(UsageError, match="corpus 'pros' is not in val; did you mean 'prose'"):
        trainer_of(Forgetting(old=["pros"])).fit(module, data)
    assert module.steps == 0
