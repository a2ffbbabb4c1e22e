"""The Trainer's limits on batches, epochs and steps are honored, also by runs that stop anywhere and resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from rewurst import UsageError
from rewurst.datamodules import TextDataModule
from rewurst.datamodules.base import Corpus
from rewurst.datamodules.sampling.trainer_limits import Epochs

pytestmark = pytest.mark.filterwarnings(
    "ignore:corpus .* is read again",
    "ignore:.*exists and is not empty",
    "ignore:.*`training_step` returned `None`.*",
    "ignore:.*number of training batches",
)


class Notes(LightningModule):
    """Callback that records the rows of every global batch and the step of every validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.rows: list[list[int]] = []
        self.waiting: list[int] = []
        self.validated: list[int] = []
        self.batch_size = 1

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.waiting += batch["row"].tolist()
        return self.weight * 1.0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rows.append(self.waiting)
        self.waiting = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None: ...

    def on_validation_start(self) -> None:
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEveryStep(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            trainer.save_checkpoint(self.folder / f"{self.steps:02}.ckpt")


Fit = Callable[..., tuple[Notes, Trainer]]


@pytest.fixture
def fit(write_corpus: Any) -> Fit:
    """Fit on 50 rows in global batches of 5: ten steps are one pass."""
    path = write_corpus("prose")

    def run(accumulation: int = 1, ckpt_path: Any = None, size: int = 4, **options: Any) -> tuple[Notes, Trainer]:
        module = Notes()
        data = TextDataModule("prose", {"prose": Corpus(path)}, {"prose": path}, 8, size // accumulation, size)
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, **{"limit_val_batches": 1} | options,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return module, trainer

    return run


LIMITS: dict[str, tuple[dict[str, Any], int, list[int]]] = {  # of a corpus of 12 steps: options, steps, validations
    "epochs": ({"max_epochs": 2}, 24, [12, 24]),
    "steps": ({"max_steps": 15, "val_check_interval": 6, "check_val_every_n_epoch": None}, 15, [3, 6, 9, 12, 15]),
    "epochs before steps": ({"max_epochs": 1, "max_steps": 60}, 12, [12]),
    "steps before epochs": ({"max_epochs": 4, "max_steps": 15}, 15, [12]),
    "a limit": ({"max_epochs": 3, "limit_train_batches": 10}, 15, [5, 10, 15]),
    "a fraction": ({"max_epochs": 3, "limit_train_batches": 0.45}, 15, [5, 10, 15]),
    "a limit and steps": ({"max_steps": 12, "limit_train_batches": 10}, 12, [5, 10]),
    "a limit above the pass": ({"max_epochs": 1, "limit_train_batches": 1000}, 12, [12]),
    "steps between validations over epochs": (
        {"max_epochs": 3, "limit_train_batches": 10, "val_check_interval": 6, "check_val_every_n_epoch": None},
        15, [3, 6, 9, 12, 15],
    ),
    "a fraction between validations": ({"max_epochs": 2, "limit_train_batches": 8, "val_check_interval": 0.5}, 8,
                                       [2, 4, 6, 8]),
    "every second epoch": ({"max_steps": 24, "check_val_every_n_epoch": 2}, 24, [24]),
    "at least two epochs": ({"max_steps": 24, "min_epochs": 2}, 24, [12, 24]),
    "no validation": ({"max_epochs": 1, "limit_val_batches": 0}, 12, []),
}  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("options", "steps", "validations"), LIMITS.values(), ids=LIMITS.keys())
def test_limits_hold_and_resume_anywhere(
    fit: Fit, tmp_path: Path, options: dict[str, Any], steps: int, validations: list[int], accumulation: int
) -> None:
    batches = {"limit_train_batches", "val_check_interval"} & options.keys()
    scaled = {name: options[name] * accumulation // 2 for name in batches if isinstance(options[name], int)}
    whole, _ = fit(accumulation, callbacks=[SaveEveryStep(tmp_path)], **options | scaled)
    assert len(whole.rows) == steps
    assert whole.validated == validations
    assert all(len(set(rows)) == 4 for rows in whole.rows), "every global batch is whole"
    assert not whole.waiting
    for stop in {1, steps // 3, steps // 2, steps - 2}:
        resumed, _ = fit(accumulation, tmp_path / f"{stop:02}.ckpt", **options | scaled)
        assert resumed.rows == whole.rows[stop:], stop
        assert resumed.validated == [at for at in validations if at > stop], stop


@pytest.mark.parametrize("accumulation", [1, 2])
def test_overfitting_repeats_the_same_batches(fit: Fit, tmp_path: Path, accumulation: int) -> None:
    options: dict[str, Any] = {"overfit_batches": 2 * accumulation, "max_steps": 7}
    whole, _ = fit(accumulation, callbacks=[SaveEveryStep(tmp_path)], **options)
    assert whole.rows == [*whole.rows[:2] * 3, whole.rows[0]]
    assert whole.rows[0] != whole.rows[1]
    for stop in (1, 2, 5):
        resumed, _ = fit(accumulation, tmp_path / f"{stop:02}.ckpt", **options)
        assert resumed.rows == whole.rows[stop:]
    with pytest.raises(UsageError, match="its corpora, weights, seed, shuffle or batch size differ"):
        fit(accumulation, tmp_path / "05.ckpt", max_steps=9)


def test_overfitting_a_fraction(fit: Fit) -> None:
    whole, _ = fit(overfit_batches=0.25, max_epochs=2)
    assert whole.rows == whole.rows[:3] * 2


def test_a_trial_run_is_of_whole_global_batches(fit: Fit) -> None:
    assert [len(rows) for rows in fit(2, fast_dev_run=True)[0].rows] == [4]
    assert [len(rows) for rows in fit(2, fast_dev_run=3)[0].rows] == [4, 4, 4]


def test_a_fraction_stays_one_for_the_next_fit(fit: Fit, write_corpus: Any) -> None:
    _, trainer = fit(limit_train_batches=0.5, max_epochs=1)
    longer = write_corpus("longer", rows=100)
    module = Notes()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, TextDataModule("longer", {"longer": Corpus(longer)}, {}, 8, 5, 5))
    assert len(module.rows) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"limit_train_batches": 21},
            "limit_train_batches 21 is not a number of whole global batches of 2 micro-batches",
        ),
        ({"overfit_batches": 1}, "overfit_batches 1 is not a number of whole global batches of 2 micro-batches: use 2"),
        ({"limit_train_batches": 0.01}, "limit_train_batches 0.01 of 12 global batches is less than one"),
        (
            {"callbacks": [GradientAccumulationScheduler({0: 2})]},
            "GradientAccumulationScheduler contradicts global_batch",
        ),
    ],
)
def test_limits_that_cannot_be_met_are_refused(fit: Fit, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(2, max_epochs=1, **options)


@pytest.mark.parametrize("name", ["batch_size", "micro_batch_size"])
def test_the_tuner_does_not_report_sizes_that_were_never_used(write_corpus: Any, tmp_path: Path, name: str) -> None:
    path = write_corpus("prose")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path, max_steps=9
    )
    data = TextDataModule("prose", {"prose": Corpus(path)}, {}, 8, 4, 4)
    with pytest.raises(UsageError, match="`rewurst plan` finds the largest micro_batch_size"):
        Tuner(trainer).scale_batch_size(Notes(), datamodule=data, batch_arg_name=name, max_trials=3)


def test_numbers_of_epochs() -> None:
    assert Epochs(10).done(step=23, start=3) == 0
    assert Epochs(10).done(step=24, start=3) == 1
    assert Epochs(10, whole_run=60).done(step=24, start=3) == 24
    assert Epochs(2, repeats=True).used(7) == 2
