"""LRRewarming from one dataset to the next: re-warmed, or in the constant phase of an infinite schedule."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_modules import COSINE, INFINITE, Foreign, Recording, expected, fit, loader, used
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import run_ranks
from save_at import SaveAt

from rewurst import UsageError
from rewurst.callbacks import (
    InfiniteCosine,
    InfiniteInverseSqrt,
    LRRewarming,
    Schedule,
    WarmupCosine,
)

# The loaders are those of a foreign project and keep no position.
pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint at step 10 of dataset "old"."""
    path = tmp_path / "old.ckpt"
    fit(Foreign(), [LRRewarming(COSINE, 10, "old"), SaveAt(10, path)], 10)
    return path


class Moments(Callback):
    """Keeps a copy of the optimizer's state as the first batch finds it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not hasattr(self, "state"):
            self.state = [copy.deepcopy(state) for state in trainer.optimizers[0].state.values()]
            self.groups = [dict(group) for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize("keep", [True, False])
def test_a_new_dataset_rewarms_with_fresh_or_kept_moments(old: Path, keep: bool) -> None:
    moments = Moments()
    callback = LRRewarming(COSINE, 20, "new", optimizer_state="keep" if keep else "reset")
    trainer = fit(Foreign(), [callback, moments], 30, old)
    assert used(trainer) == expected(COSINE, 20, range(20))
    assert callback.run.start == 10
    saved = torch.load(old, weights_only=True)["optimizer_states"][0]["state"]
    if keep:
        for state, kept in zip(moments.state, saved.values(), strict=True):
            for name in ("step", "exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(state[name], kept[name], rtol=0, atol=0)
    else:
        assert moments.state == []
        assert all(int(state["step"]) == 20 for state in trainer.optimizers[0].state.values())


def test_a_reset_takes_the_new_settings_of_the_optimizer(old: Path) -> None:
    class Decaying(Foreign):
        def configure_optimizers(self) -> Any:
            return Recording(self.layer.parameters(), lr=1e-3, weight_decay=0.7)

    moments = Moments()
    fit(Decaying(), [LRRewarming(COSINE, 20, "new"), moments], 30, old)
    assert [group["weight_decay"] for group in moments.groups] == [0.7]


@pytest.mark.parametrize("scheduler", [True, False])
def test_a_checkpoint_from_before_the_callback(tmp_path: Path, scheduler: bool) -> None:
    path = tmp_path / "before.ckpt"
    fit(Foreign(scheduler=scheduler, second_lr=2e-3), [SaveAt(7, path)], 10)
    for state in ("reset", "keep"):
        callback = LRRewarming(COSINE, 20, "new", optimizer_state=state)  # type: ignore[arg-type]
        trainer = fit(Foreign(second_lr=2e-3), [callback], 27, path)
        assert callback.run.start == 7
        assert used(trainer) == expected(COSINE, 20, range(20))
        assert used(trainer, group=1) == [2 * value for value in expected(COSINE, 20, range(20))]


def test_an_infinite_schedule_keeps_the_learning_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(Foreign(), [LRRewarming(INFINITE, 20, "one"), SaveAt(15, path)], 20)
    moments = Moments()
    trainer = fit(Foreign(), [LRRewarming(INFINITE, 20, "two"), moments], 35, path)
    assert used(trainer)[:16] == [INFINITE.constant] * 16
    assert used(trainer)[16:] == expected(INFINITE, 20, range(16, 20))
    assert len(moments.state) == 2, "the optimizer continues as well"


def test_a_constant_phase_may_grow_and_annealing_may_be_requested(tmp_path: Path) -> None:
    path, longer = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    fit(Foreign(), [LRRewarming(INFINITE, 20, "one"), SaveAt(12, path)], 20)
    extended = LRRewarming(INFINITE, 20, "one", constant_extension=6)
    trainer = fit(Foreign(), [extended, SaveAt(20, longer)], 26, path)
    assert used(trainer) == [INFINITE.constant] * 8
    trainer = fit(Foreign(), [LRRewarming(INFINITE, 20, "one", constant_extension=6)], 26, longer)
    assert used(trainer) == [INFINITE.constant] * 2 + expected(INFINITE, 20, range(16, 20))
    annealing = LRRewarming(INFINITE, 20, "one", constant_extension=6, anneal_length=5)
    trainer = fit(Foreign(), [annealing], 25, longer)
    ratio = INFINITE.minimum / INFINITE.constant
    assert used(trainer) == pytest.approx([INFINITE.constant * ratio ** (step / 5) for step in range(5)], rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "dataset", "max_steps", "message"),
    [
        (
            (COSINE, 30),
            "old",
            30,
            "was started with WarmupCosine(peak=0.01, minimum=0.001, warmup=0.1) over 10 steps, now",
        ),
        ((WarmupCosine(2e-2, 1e-3, 0.1), 10), "old", 30, "now it is WarmupCosine(peak=0.02"),
        ((COSINE, 10), "old", 10, "is complete: the checkpoint is at step 10 and trainer.max_steps 10 is absolute"),
        (
            (COSINE, 20),
            "new",
            10,
            "has no steps left to train: the checkpoint is at step 10 and trainer.max_steps 10 is absolute",
        ),
        ((COSINE, 20), "new", 5, "set it to 30 for 20 more steps"),
        ((COSINE, "1M tokens"), "new", 30, "is in tokens, but NoneType does not count them"),
    ],
)
def test_restores_that_are_refused(
    old: Path, arguments: tuple[Schedule, int | str], dataset: str, max_steps: int, message: str
) -> None:
    with pytest.raises(UsageError) as error:
        fit(Foreign(), [LRRewarming(*arguments, dataset)], max_steps, old)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stop", "arguments", "message"),
    [
        (
            5,
            {"dataset": "two"},
            "must begin in the constant phase of 'one', steps 10 to 16: the checkpoint is at step 5",
        ),
        (18, {"dataset": "two"}, "the checkpoint is at step 18, after annealing has begun"),
        (18, {"dataset": "one", "constant_extension": 4}, "the constant phase of 'one' ended at step 16 already"),
        (18, {"dataset": "one", "anneal_length": 4}, "annealing must begin in the constant phase"),
    ],
)
def test_an_infinite_schedule_continues_only_from_its_constant_phase(
    tmp_path: Path, stop: int, arguments: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.ckpt"
    fit(Foreign(), [LRRewarming(INFINITE, 20, "one"), SaveAt(stop, path)], 20)
    with pytest.raises(UsageError, match=message):
        fit(Foreign(), [LRRewarming(INFINITE, 20, **arguments)], 40, path)


def test_an_infinite_schedule_continues_another_only_at_the_same_level(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(Foreign(), [LRRewarming(INFINITE, 20, "one"), SaveAt(15, path)], 20)
    other = InfiniteInverseSqrt(1e-2, 5e-3, 1e-3, 0.1, 0.5, 0.8)
    trainer = fit(Foreign(), [LRRewarming(other, 20, "two")], 20, path)
    assert used(trainer) == [INFINITE.constant] * 5
    with pytest.raises(UsageError, match=r"constant 0.006 differs from the 0.005 of 'one'"):
        fit(Foreign(), [LRRewarming(InfiniteCosine(1e-2, 6e-3, 1e-3, 0.1, 0.5, 0.8), 20, "two")], 20, path)


def test_another_dataset_in_the_same_process_continues_in_the_constant_phase() -> None:
    rewarming = LRRewarming(INFINITE, 20, "one")
    trainer = fit(Foreign(), [rewarming], 15)
    first = used(trainer)
    rewarming._argument = "two"
    trainer.fit_loop.epoch_loop.max_steps = 25
    trainer.fit(trainer.lightning_module, loader())
    assert first == expected(INFINITE, 20, range(15))
    assert used(trainer) == [INFINITE.constant] * 10


DDP = """
import json, sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from rewurst.callbacks import LRRewarming, WarmupCosine

folder, begin = Path(sys.argv[1]), int(sys.argv[2])


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.rates = torch.nn.Linear(2, 1), []

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


module = Module()
callback = LRRewarming(WarmupCosine(1e-2, 1e-3, 0.1), 10, "new" if begin else "old")
trainer = Trainer(
    accelerator="cpu", strategy="ddp", devices=2, max_steps=begin + 10, max_epochs=-1, callbacks=[callback],
    accumulate_grad_batches=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)
ckpt_path = folder / "a.ckpt" if begin else None
trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(200, 2)), ckpt_path=ckpt_path, weights_only=True)
trainer.save_checkpoint(folder / "a.ckpt")
(folder / f"{begin}-{trainer.global_rank}.json").write_text(json.dumps([module.rates, callback.run.start]))
"""


def test_two_processes_use_the_same_rates_and_rewarm_together(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    for begin in (0, 10):
        run_ranks(script, str(tmp_path), str(begin), processes=2)
        for rank in (0, 1):
            rates, start = json.loads((tmp_path / f"{begin}-{rank}.json").read_text())
            assert start == begin
            assert rates == expected(COSINE, 10, range(10))
