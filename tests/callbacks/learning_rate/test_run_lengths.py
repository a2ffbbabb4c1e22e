"""Lengths derived from the run: passes over the new corpora, or all remaining steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from save_at import SaveAt
from text_reading import _QUIET, Reader

from rewurst import UsageError
from rewurst.callbacks import LRRewarming, WarmupCosine
from rewurst.callbacks.learning_rate.lengths import in_steps
from rewurst.datamodules import Corpus, TextDataModule


class Epochs:
    epoch_steps = 30
    tokens_per_step = 1000


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("1 epoch", 30), ("2 epochs", 60), ("0.5 epochs", 15), ("0.01 epoch", 1), (7, 7), ("700", 700),
        ("5k tokens", 5), ("5001 tokens", 6),
    ],
)  # fmt: skip
def test_lengths_in_steps(length: int | str, steps: int) -> None:
    assert in_steps(length, Epochs()) == steps


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ("0 epochs", "length '0 epochs' must be above 0"),
        ("1 epoch", "length '1 epoch' is in epochs, but object does not count them: give it in steps"),
        ("an epoch", "length 'an epoch' is no length"),
    ],
)
def test_invalid_lengths(length: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        in_steps(length, object())


@pytest.fixture
def data(write_corpus: Callable[..., str]) -> Callable[..., TextDataModule]:
    code = write_corpus("code", 30)

    def build(dataset: str = "code", **changes: Any) -> TextDataModule:
        arguments = {"sequence_length": 8, "micro_batch_size": 2, "global_batch_size": 4, **changes}
        return TextDataModule(dataset, {dataset: Corpus(code)}, {"val": code}, **arguments)

    return build


def fit(data: TextDataModule, length: int | str, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> Any:
    rewarming = LRRewarming(WarmupCosine(1e-2, 1e-3, 0), length)
    trainer = Trainer(accelerator="cpu", callbacks=[rewarming, *callbacks], logger=False, **{**_QUIET, **options})
    trainer.fit(Reader(), data, ckpt_path=ckpt_path)
    return rewarming


def test_an_epoch_is_a_pass_over_the_new_corpora(data: Callable[..., TextDataModule]) -> None:
    run = fit(data(), "1 epoch", max_epochs=1).run
    assert (run.start, run.end) == (0, 7)  # 30 rows in batches of 4


def test_to_max_steps_is_the_remaining_steps(data: Callable[..., TextDataModule], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    first = fit(data(), "to max_steps", SaveAt(6, path), max_steps=9)
    assert (first.run.start, first.run.end) == (0, 9)
    same = fit(data(), "to max_steps", max_steps=9, ckpt_path=path)
    assert (same.run.start, same.run.end) == (0, 9)
    other = fit(data("other"), "to max_steps", max_steps=9, ckpt_path=path)
    assert (other.run.start, other.run.end) == (3, 9)
    assert other.value(9) == pytest.approx(1e-3)
    with pytest.raises(UsageError, match=r"was begun with .* over 9 steps, now it is .* over 12 steps"):
        fit(data(), "to max_steps", max_steps=12, ckpt_path=path)
    with pytest.raises(UsageError, match=r"needs trainer\.max_steps"):
        fit(data(), "to max_steps", max_epochs=1)


class Validations(Reader):
    """Callback that records the steps at which a validation begins."""

    def on_validation_start(self) -> None:
        self.__dict__.setdefault("steps", []).append(self.trainer.global_step)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_validations_come_at_their_interval(data: Callable[..., TextDataModule], micro_batch_size: int) -> None:
    module = Validations()
    options = {**_QUIET, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", max_steps=20, logger=False, **options)
    trainer.fit(module, data(micro_batch_size=micro_batch_size, validate_every_n_steps=5))
    assert module.steps == [5, 10, 15, 20]


def test_two_intervals_are_refused(data: Callable[..., TextDataModule]) -> None:
    trainer = Trainer(accelerator="cpu", max_steps=20, logger=False, val_check_interval=3, **_QUIET)
    with pytest.raises(UsageError, match=r"validate_every_n_steps 5 and trainer\.val_check_interval 3 are both set"):
        trainer.fit(Reader(), data(validate_every_n_steps=5))
    with pytest.raises(UsageError, match="validate_every_n_steps 0 must be at least 1"):
        data(validate_every_n_steps=0)


def test_a_schedule_is_drawn_with_the_known_lengths(data: Callable[..., TextDataModule]) -> None:
    rewarming = LRRewarming(WarmupCosine(1e-2, 1e-3, 0), "to max_steps")
    assert rewarming.planned(data(), 9).end == 9
    with pytest.raises(UsageError, match=r"needs trainer\.max_steps"):
        rewarming.planned(data())
    with pytest.raises(UsageError, match="the steps of an epoch are known when the corpora are open"):
        LRRewarming(WarmupCosine(1e-2, 1e-3, 0), "1 epoch").planned(data())
