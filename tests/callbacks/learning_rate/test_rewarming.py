"""LRRewarming on foreign modules, with learning rates read from inside ``optimizer.step``."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_modules import COSINE, INFINITE, Foreign, ManualGAN, expected, fit, loader, used
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from save_at import SaveAt
from torch import Tensor

from rewurst import UsageError
from rewurst.callbacks import (
    Constant,
    LRRewarming,
    WarmupStableDecay,
)

# The loaders are those of a foreign project and keep no position.
pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(1, 79), accumulate=st.sampled_from([1, 4]))
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stop: int, accumulate: int) -> None:
    batches = min(stop, 20 * accumulate - 1)
    path = tmp_path / f"{stop}-{accumulate}.ckpt"
    first = fit(Foreign(), [LRRewarming(COSINE, 20, "old"), SaveAt(batches, path)], 20, accumulate=accumulate)
    second = fit(Foreign(), [LRRewarming(COSINE, 20, "old")], 20, path, accumulate)
    assert used(first) + used(second) == expected(COSINE, 20, range(20))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_manual_optimization_counts_a_batch_once_and_keeps_the_ratio_of_its_optimizers(accumulate: int) -> None:
    trainer = fit(ManualGAN(accumulate), [LRRewarming(COSINE, 10, "old")], max_steps=20)
    values = expected(COSINE, 10, range(10))
    assert used(trainer) == values
    assert used(trainer, optimizer=1) == [value * (4e-4 / 1e-4) for value in values]


def test_parameter_groups_keep_their_ratio_through_a_restore(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(Foreign(second_lr=5e-4), [LRRewarming(COSINE, 10, "old"), SaveAt(5, path)], 10)
    for dataset, steps in (("old", range(5, 10)), ("new", range(5))):
        trainer = fit(Foreign(second_lr=5e-4), [LRRewarming(COSINE, 10, dataset)], 10, path)
        assert used(trainer, group=1) == [value * 0.5 for value in expected(COSINE, 10, steps)]


def test_a_tensor_learning_rate_is_changed_in_place() -> None:
    module = Foreign(tensor_lr=True, second_lr=1e-3)
    trainer = fit(module, [LRRewarming(COSINE, 10, "old")], 10)
    assert used(trainer) == pytest.approx(expected(COSINE, 10, range(10)), rel=1e-6)
    assert isinstance(trainer.optimizers[0].param_groups[0]["lr"], Tensor)


class Compiled(torch.optim.AdamW):
    """AdamW with a compiled step that counts its compilations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compilations = 0
        self._compiled = torch.compile(lambda: torch.optim.AdamW.step(self), backend=self._count)

    def _count(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.compilations += 1
        return graph.forward

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        self._compiled()


def test_a_compiled_step_reads_the_tensor_and_is_not_recompiled() -> None:
    class Module(Foreign):
        def __init__(self, optimizer: type[torch.optim.AdamW]) -> None:
            torch.manual_seed(0)
            super().__init__()
            self.optimizer = optimizer

        def configure_optimizers(self) -> Any:
            return self.optimizer(self.parameters(), lr=torch.tensor(1e-3), foreach=False)

    modules = [Module(optimizer) for optimizer in (torch.optim.AdamW, Compiled)]
    for module in modules:
        torch.manual_seed(1)
        trainer = fit(module, [LRRewarming(COSINE, 12, "old")], 12)
    torch.testing.assert_close(modules[1].layer.weight, modules[0].layer.weight, rtol=1e-5, atol=1e-6)
    assert 0 < trainer.optimizers[0].compilations <= 2, "a float would be a constant of the graph, compiled 12 times"


@pytest.mark.parametrize("first", [True, False])
def test_the_monitor_logs_the_used_rate_at_any_place_in_the_list(tmp_path: Path, first: bool) -> None:
    callbacks: list[Callback] = [LRRewarming(COSINE, 10, "old"), LearningRateMonitor()]
    logger = CSVLogger(tmp_path)
    fit(Foreign(), callbacks[:: -1 if first else 1], 10, logger=logger, log_every_n_steps=1)
    logged: dict[int, float] = {}
    for row in csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()):
        step, lr = int(row["step"]), float(row["lr-Recording/pg1"])
        assert logged.setdefault(step, lr) == lr
    assert [logged[step] for step in range(10)] == expected(COSINE, 10, range(10))


def test_lengths_in_tokens_round_up(tmp_path: Path) -> None:
    from rewurst.callbacks.learning_rate.lengths import in_steps

    class Counting:
        tokens_per_step = 2048

    assert in_steps("1.4M tokens", Counting()) == 684
    assert in_steps("2048 tokens", Counting()) == 1
    assert in_steps("2049 tokens", Counting()) == 2
    assert in_steps("300B tokens", Counting()) == -(-300 * 10**9 // 2048)
    assert in_steps(700, None) == in_steps("700 steps", None) == 700


def test_finished_epochs_are_reported() -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "enable_checkpointing": False, "limit_train_batches": 3}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ckpt"
        trainer = Trainer(max_epochs=1, callbacks=[LRRewarming(COSINE, 3, "old")], **options)
        trainer.fit(Foreign(), loader())
        trainer.save_checkpoint(path)
        trainer = Trainer(max_epochs=1, callbacks=[LRRewarming(COSINE, 3, "new")], **options)
        with pytest.raises(
            UsageError, match=r"the checkpoint has finished 1 epochs and trainer.max_epochs 1 is absolute"
        ):
            trainer.fit(Foreign(), loader(), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LRRewarming(COSINE, "ten"), "length 'ten' is not a length"),
        (lambda: LRRewarming(COSINE, 0), "length 0 must be at least 1"),
        (lambda: LRRewarming(COSINE, 10, optimizer_state="drop"), "optimizer_state 'drop' must be"),  # type: ignore[arg-type]
        (lambda: LRRewarming(COSINE, 10, anneal_length=5), "WarmupCosine has no constant phase"),
        (lambda: fit(Foreign(), [LRRewarming(COSINE, 10)], 3), "the data module names no dataset"),
        (lambda: fit(Foreign(scheduler=True), [LRRewarming(COSINE, 10, "a")], 3), "CosineAnnealingLR and LRRewarming"),
        (lambda: fit(Foreign(), [LRRewarming(INFINITE, 9, "a", anneal_length=3)], 3), "needs a checkpoint in the"),
    ],
)
def test_bad_input(build: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_max_steps_beyond_the_schedule_is_reported() -> None:
    with pytest.warns(UserWarning, match="max_steps 8 goes beyond the schedule of 'a', which ends at step 5"):
        trainer = fit(Foreign(), [LRRewarming(WarmupStableDecay(1e-2, 1e-3, 0.2, 0.4), 5, "a")], 8)
    assert used(trainer)[5:] == [1e-3] * 3


def test_constant_and_validation_only() -> None:
    trainer = fit(Foreign(), [LRRewarming(Constant(2e-3), 3, "a")], 3)
    assert used(trainer) == [2e-3] * 3
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[LRRewarming(COSINE, 3)])
    assert trainer.validate(_Validating(), loader(), verbose=False) == [{}]


class _Validating(Foreign):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass
