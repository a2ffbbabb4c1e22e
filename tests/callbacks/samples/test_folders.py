"""Samples are stored next to the run's files, under the step at which they were drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from project_logger import ProjectLogger
from torch import Tensor, nn

from rewurst.callbacks import LogSamples, LogText

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader is not resumable.*", "ignore:.*exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`", "ignore:Using ModelCheckpoint with manual optimization",
)  # fmt: skip


class Draws(LightningModule):
    """Module with one or two optimizers, because Lightning counts the steps of each."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(optimizers))
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.weights[0] * 2
        for optimizer, weight in zip(self.optimizers(), self.weights, strict=True):  # type: ignore[arg-type]
            self.manual_backward(weight * 2)
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    def draw_samples(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"original": batch["image"].float() / 255}

    def continue_text(self, prompts: list[str], max_new_tokens: int, temperature: float) -> list[str]:
        return ["text" for _ in prompts]

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([weight], lr=0.1) for weight in self.weights]


def trainer_of(logger: Any, steps: int = 4, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=logger, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        log_every_n_steps=1, **({"callbacks": [LogSamples(1), LogText(["a"])]} | options),
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*step=*.??*") if path.suffix in (".png", ".md"))


def test_two_runs_of_one_project_have_folders_of_their_own(picture_data: Any, tmp_path: Path) -> None:
    for _ in range(2):
        trainer = trainer_of(ProjectLogger("p", str(tmp_path)), enable_checkpointing=False)
        trainer.fit(Draws(), picture_data())
    folders = list((tmp_path / "p").iterdir())
    assert len(folders) == 2
    steps = [f"{name}-step=000000{step}.png" for name in ("seen", "unseen") for step in (2, 4)]
    for folder in folders:
        assert names(folder) == sorted([*steps, "text-step=0000002.md", "text-step=0000004.md"])


def test_a_trial_run_writes_nothing(picture_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer_of(CSVLogger(tmp_path), fast_dev_run=True).fit(Draws(), picture_data())
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("only_weights", [False, True])
def test_a_validated_checkpoint_has_its_own_step(
    picture_data: Any, tmp_path: Path, optimizers: int, only_weights: bool
) -> None:
    if only_weights and optimizers == 2:
        pytest.skip("nothing in it says how many optimizers were counted")
    save = ModelCheckpoint(tmp_path, every_n_train_steps=3 * optimizers, save_weights_only=only_weights)
    steps = 4 * optimizers
    trainer_of(False, steps, callbacks=[save], default_root_dir=tmp_path).fit(Draws(optimizers), picture_data())
    trainer = trainer_of(CSVLogger(tmp_path), steps)
    trainer.validate(Draws(optimizers), picture_data(), ckpt_path=save.best_model_path, weights_only=True)
    assert names(tmp_path) == ["seen-step=0000003.png", "text-step=0000003.md", "unseen-step=0000003.png"]
