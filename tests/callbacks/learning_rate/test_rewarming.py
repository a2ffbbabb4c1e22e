"""LRRewarming on modules that know nothing of it, with learning rates read from inside ``optimizer.step``."""

from __future__ import annotations

import copy
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rewurst import UsageError
from rewurst.callbacks import (
    Constant,
    InfiniteCosine,
    InfiniteInverseSqrt,
    LRRewarming,
    Schedule,
    WarmupCosine,
    WarmupStableDecay,
)

# The loaders here are a foreign project's, which keep no position.
pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")

COSINE = WarmupCosine(1e-2, 1e-3, 0.1)
INFINITE = InfiniteCosine(1e-2, 5e-3, 1e-3, 0.1, 0.5, 0.8)


class Recording(torch.optim.AdamW):
    """AdamW that writes down the learning rates it steps with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used: list[list[float]] = []

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        result = super().step(closure)
        # Lightning's closure, run by super().step, is where hooks before the step are called.
        self.used.append([float(group["lr"]) for group in self.param_groups])
        return result


class Foreign(LightningModule):
    """Somebody else's module: automatic optimization."""

    def __init__(self, scheduler: bool = False, tensor_lr: bool = False, second_lr: float = 1e-3) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.scheduler, self.tensor_lr, self.second_lr = scheduler, tensor_lr, second_lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        lr = torch.tensor(1e-3) if self.tensor_lr else 1e-3
        groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": self.second_lr}]
        optimizer = Recording(groups, lr=lr)
        if self.scheduler:
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)]
        return optimizer


class ManualGAN(LightningModule):
    """Two optimizers by hand, with an accumulation of its own."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d, self.accumulate = nn.Linear(2, 1), nn.Linear(2, 1), accumulate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for network, optimizer in zip((self.g, self.d), self.optimizers(), strict=True):  # type: ignore[arg-type]
            self.manual_backward(network(batch[0]).square().mean())
            if (batch_idx + 1) % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return Recording(self.g.parameters(), lr=1e-4), Recording(self.d.parameters(), lr=4e-4)


class SaveAt(Callback):
    """Saves a checkpoint after a number of batches, and stops there."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4096, 2)))


def fit(
    module: LightningModule,
    callbacks: list[Callback],
    max_steps: int,
    ckpt_path: Path | None = None,
    accumulate: int = 1,
    **options: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def used(trainer: Trainer, group: int = 0, optimizer: int = 0) -> list[float]:
    return [lrs[group] for lrs in trainer.optimizers[optimizer].used]  # type: ignore[attr-defined]


def expected(schedule: Schedule, length: int, steps: range) -> list[float]:
    return [schedule.value(step, length) for step in steps]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(1, 79), accumulate=st.sampled_from([1, 4]))
def test_stopped_anywhere_and_resumed_equals_one_piece(tmp_path: Path, stop: int, accumulate: int) -> None:
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
    """AdamW whose step is compiled, and which counts its compilations."""

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


def test_a_compiled_step_reads_the_tensor_and_is_not_compiled_anew() -> None:
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
def test_the_monitor_logs_what_the_step_uses_wherever_it_stands(tmp_path: Path, first: bool) -> None:
    callbacks: list[Callback] = [LRRewarming(COSINE, 10, "old"), LearningRateMonitor()]
    logger = CSVLogger(tmp_path)
    fit(Foreign(), callbacks[:: -1 if first else 1], 10, logger=logger, log_every_n_steps=1)
    logged: dict[int, float] = {}
    for row in csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()):
        step, lr = int(row["step"]), float(row["lr-Recording/pg1"])
        assert logged.setdefault(step, lr) == lr
    assert [logged[step] for step in range(10)] == expected(COSINE, 10, range(10))


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


def test_a_never_ending_schedule_leaves_the_learning_rate_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(Foreign(), [LRRewarming(INFINITE, 20, "one"), SaveAt(15, path)], 20)
    moments = Moments()
    trainer = fit(Foreign(), [LRRewarming(INFINITE, 20, "two"), moments], 35, path)
    assert used(trainer)[:16] == [INFINITE.constant] * 16
    assert used(trainer)[16:] == expected(INFINITE, 20, range(16, 20))
    assert len(moments.state) == 2, "the optimizer goes on as well"


def test_a_constant_phase_may_grow_and_annealing_may_be_asked_for(tmp_path: Path) -> None:
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


def test_lengths_in_tokens_round_up(tmp_path: Path) -> None:
    from rewurst.callbacks.learning_rate.lengths import in_steps

    class Counting:
        tokens_per_step = 2048

    assert in_steps("1.4M tokens", Counting()) == 684
    assert in_steps("2048 tokens", Counting()) == 1
    assert in_steps("2049 tokens", Counting()) == 2
    assert in_steps("300B tokens", Counting()) == -(-300 * 10**9 // 2048)
    assert in_steps(700, None) == in_steps("700 steps", None) == 700


@pytest.mark.parametrize(
    ("arguments", "dataset", "max_steps", "message"),
    [
        (
            (COSINE, 30),
            "old",
            30,
            "was begun with WarmupCosine(peak=0.01, minimum=0.001, warmup=0.1) over 10 steps, now",
        ),
        ((WarmupCosine(2e-2, 1e-3, 0.1), 10), "old", 30, "now it is WarmupCosine(peak=0.02"),
        ((COSINE, 10), "old", 10, "is complete: the checkpoint is at step 10 and trainer.max_steps 10 is absolute"),
        (
            (COSINE, 20),
            "new",
            10,
            "would do no step: the checkpoint is at step 10 and trainer.max_steps 10 is absolute",
        ),
        ((COSINE, 20), "new", 5, "set it to 30 for 20 more steps"),
        ((COSINE, "1M tokens"), "new", 30, "is in tokens, but NoneType counts none"),
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
        (18, {"dataset": "two"}, "the checkpoint is at step 18, where annealing has begun"),
        (18, {"dataset": "one", "constant_extension": 4}, "the constant phase of 'one' ended at step 16 already"),
        (18, {"dataset": "one", "anneal_length": 4}, "annealing must begin in the constant phase"),
    ],
)
def test_a_never_ending_schedule_goes_on_from_its_constant_phase_only(
    tmp_path: Path, stop: int, arguments: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.ckpt"
    fit(Foreign(), [LRRewarming(INFINITE, 20, "one"), SaveAt(stop, path)], 20)
    with pytest.raises(UsageError, match=message):
        fit(Foreign(), [LRRewarming(INFINITE, 20, **arguments)], 40, path)


def test_one_never_ending_schedule_continues_another_but_not_at_another_level(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(Foreign(), [LRRewarming(INFINITE, 20, "one"), SaveAt(15, path)], 20)
    other = InfiniteInverseSqrt(1e-2, 5e-3, 1e-3, 0.1, 0.5, 0.8)
    trainer = fit(Foreign(), [LRRewarming(other, 20, "two")], 20, path)
    assert used(trainer) == [INFINITE.constant] * 5
    with pytest.raises(UsageError, match=r"constant 0.006 differs from the 0.005 of 'one'"):
        fit(Foreign(), [LRRewarming(InfiniteCosine(1e-2, 6e-3, 1e-3, 0.1, 0.5, 0.8), 20, "two")], 20, path)


def test_another_dataset_in_the_same_process_goes_on_in_the_constant_phase() -> None:
    rewarming = LRRewarming(INFINITE, 20, "one")
    trainer = fit(Foreign(), [rewarming], 15)
    first = used(trainer)
    rewarming._argument = "two"
    trainer.fit_loop.epoch_loop.max_steps = 25
    trainer.fit(trainer.lightning_module, loader())
    assert first == expected(INFINITE, 20, range(15))
    assert used(trainer) == [INFINITE.constant] * 10


def test_finished_epochs_are_said() -> None:
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
        (lambda: LRRewarming(COSINE, "ten"), "length 'ten' is no length"),
        (lambda: LRRewarming(COSINE, 0), "length 0 must be at least 1"),
        (lambda: LRRewarming(COSINE, 10, optimizer_state="drop"), "optimizer_state 'drop' must be"),  # type: ignore[arg-type]
        (lambda: LRRewarming(COSINE, 10, anneal_length=5), "WarmupCosine has no constant phase"),
        (lambda: fit(Foreign(), [LRRewarming(COSINE, 10)], 3), "the data module names no dataset"),
        (lambda: fit(Foreign(scheduler=True), [LRRewarming(COSINE, 10, "a")], 3), "CosineAnnealingLR beside"),
        (lambda: fit(Foreign(), [LRRewarming(INFINITE, 9, "a", anneal_length=3)], 3), "needs a checkpoint in the"),
    ],
)
def test_bad_input(build: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_max_steps_beyond_the_schedule_is_said() -> None:
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
