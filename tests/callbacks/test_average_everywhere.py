"""Every way of saving includes the average, and no weights of a project are lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rewurst.callbacks import Constant, ExactResume, LRRewarming, SaveOnSignal, WeightAverage

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader is not resumable.*", "ignore:.*exists and is not empty", "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`", "ignore:Using ModelCheckpoint with manual optimization",
    "ignore:You defined a `validation_step` but have no", "ignore:.*returned `None`, this fit will run",
)  # fmt: skip


class Net(LightningModule):
    """Loss 0.5 w^2 plus the batch: steps are those of gradient descent on a parabola."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)
        for layer in (self.backbone, self.head):
            nn.init.ones_(layer.weight)
        self.automatic_optimization = not raw

    def loss(self, batch: Tensor) -> Tensor:
        return self.head(self.backbone(batch)).square().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trainer_of(steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks), **{"max_steps": steps, "max_epochs": -1} | options,
    )  # fmt: skip


def loader(batches: int = 4) -> Any:
    """Return equal batches, so that the position of a plain loader does not matter."""
    return DataLoader(torch.ones(batches, 1, 1), batch_size=None)  # type: ignore[arg-type]


def saved_by(path: Path, only_weights: bool) -> dict[str, Callable[[], ModelCheckpoint]]:
    return {
        "steps": lambda: ModelCheckpoint(path, "a", every_n_train_steps=4, save_weights_only=only_weights),
        "epochs": lambda: ModelCheckpoint(path, "a", every_n_epochs=1, save_weights_only=only_weights),
        "the end": lambda: ModelCheckpoint(
            path, "x", every_n_train_steps=99, save_weights_only=only_weights, save_last=True
        ),
    }


@pytest.mark.parametrize("only_weights", [False, True])
@pytest.mark.parametrize("how", ["steps", "epochs", "the end", "by hand", "by hand, afterwards", "after a validation"])
def test_every_path_saves_the_average(tmp_path: Path, how: str, only_weights: bool) -> None:
    module, path = Net(), tmp_path / ("last.ckpt" if how == "the end" else "a.ckpt")

    class Save(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(path, only_weights)

    makers = saved_by(tmp_path, only_weights)
    trainer = trainer_of(
        4, WeightAverage(0.8), *([makers[how]()] if how in makers else []), *[Save()] * (how == "by hand")
    )
    trainer.fit(module, loader())
    if how == "after a validation":
        trainer.validate(module, loader(1), verbose=False)
    if how in ("by hand, afterwards", "after a validation"):
        trainer.save_checkpoint(path, only_weights)
    content = torch.load(path, weights_only=True)
    assert same(content["state_dict"], weights(module)), "the module ends on its average"
    if not only_weights:
        raw = content["current_model_state"]
        assert not same(raw, weights(module))
        whole = Net()
        trainer_of(8, WeightAverage(0.8)).fit(whole, loader())
        resumed = Net()
        trainer_of(8, WeightAverage(0.8)).fit(resumed, loader(), ckpt_path=path, weights_only=True)
        assert same(weights(whole), weights(resumed))


def test_a_second_fit_continues_with_the_weights() -> None:
    module, plain = Net(), Net()
    trainer_of(4).fit(plain, loader())
    begun: list[dict[str, Tensor]] = []

    class Begin(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            begun.append(weights(pl_module))

    trainer = trainer_of(4, average := WeightAverage(0.8), Begin())
    trainer.fit(module, loader())
    ended = weights(module)
    trainer.fit(module, loader())  # no steps are left
    assert same(weights(module), ended)
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(module, loader())
    assert average.step == 5
    assert same(begun[4], weights(plain)), "it continues with the weights that were trained"


def test_weights_changed_by_the_user_are_not_replaced(tmp_path: Path) -> None:
    module = Net()
    trainer = trainer_of(4, WeightAverage(0.8))
    trainer.fit(module, loader())
    own = weights(Net())
    module.load_state_dict(own)
    for only_weights in (False, True):
        trainer.save_checkpoint(tmp_path / "a.ckpt", only_weights)
        assert same(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"], own)


@pytest.mark.parametrize("average", [WeightAverage(0.8, every=100), WeightAverage(0.8)])
def test_an_average_that_was_never_updated_replaces_nothing(tmp_path: Path, average: WeightAverage) -> None:
    """Before the first update, or with an optimizer that is not visible."""

    class Unseen(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            with torch.no_grad():
                self.head.weight.mul_(0.9)
            return None

    module: Net = Net() if average.every > 1 else Unseen(raw=True)
    plain: Net = Net() if average.every > 1 else Unseen(raw=True)
    trainer = trainer_of(-1, average, max_epochs=1, val_check_interval=2)
    if average.every > 1:
        trainer.fit(module, loader(), loader(1))
    else:
        with pytest.warns(UserWarning, match="no optimizer step was seen, so nothing was averaged"):
            trainer.fit(module, loader(), loader(1))
    trainer_of(-1, max_epochs=1).fit(plain, loader())
    assert same(weights(module), weights(plain))
    for only_weights in (False, True):
        trainer.save_checkpoint(tmp_path / "a.ckpt", only_weights)
        assert same(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"], weights(plain))


@pytest.mark.parametrize("stop", [3, 50])
def test_before_the_first_update_a_run_resumes_exactly(tmp_path: Path, stop: int) -> None:
    whole, resumed = Net(), Net()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer_of(60, WeightAverage(0.8, every=7), save).fit(whole, loader())
    path = tmp_path / f"step={stop}.ckpt"
    trainer_of(60, WeightAverage(0.8, every=7)).fit(resumed, loader(), ckpt_path=path, weights_only=True)
    assert same(weights(whole), weights(resumed))
    average = torch.load(path, weights_only=True)["averaging_state"]
    assert bool(average) == (stop < 7)
    assert all(torch.equal(tensor, torch.ones(1, 1)) for tensor in average.values())


def test_optimizers_that_are_stepped_by_hand() -> None:
    wrapped, raw = WeightAverage(0.8), WeightAverage(0.8)
    automatic, module = Net(), Net(raw=True)
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer_of(-1, wrapped, max_epochs=2).fit(automatic, loader())
    trainer_of(-1, raw, ExactResume(), Rates(), max_epochs=2).fit(module, loader())
    assert raw.step == 8
    assert same(weights(automatic), weights(module))
    rewarming = LRRewarming(Constant(0.1), length=8, dataset="a")
    trainer_of(-1, rewarming, max_epochs=2).fit(Net(raw=True), loader())
    assert rewarming.step == 8


@pytest.mark.parametrize("seen", [True, False])
def test_a_signal_is_not_swallowed(tmp_path: Path, seen: bool) -> None:
    class Unseen(Net):
        def configure_optimizers(self) -> Any:
            self.hidden = super().configure_optimizers()

        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return self.hidden

    class Send(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    module = Net(raw=True) if seen else Unseen(raw=True)
    trainer = trainer_of(-1, Send(), SaveOnSignal(), max_epochs=3, default_root_dir=tmp_path)
    trainer.fit(module, loader())
    assert trainer.fit_loop.epoch_loop.batch_idx == 1
    assert (tmp_path / "checkpoints/signal.ckpt").exists()


def test_a_signal_stops_without_validating_and_its_file_goes_with_the_next_save(tmp_path: Path) -> None:
    class Send(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    validated: list[int] = []

    class Validated(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            validated.append(self.trainer.global_step)

    def run(steps: int, *callbacks: Callback, **options: Any) -> Trainer:
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = trainer_of(
            steps, *callbacks, SaveOnSignal(), save, min_steps=6, num_sanity_val_steps=0, val_check_interval=3
        )
        trainer.fit(Validated(), loader(), loader(1), weights_only=True, **options)
        return trainer

    assert run(8, Send()).global_step == 3
    assert validated == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["signal.ckpt", "step=2.ckpt"]
    run(8, ckpt_path=tmp_path / "signal.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step={step}.ckpt" for step in (2, 4, 6, 8)]


def test_a_backbone_that_is_unfrozen_later(tmp_path: Path) -> None:
    def run(epochs: int, folder: str, **options: Any) -> tuple[Net, WeightAverage]:
        module, average = Net(), WeightAverage(0.5)
        unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
        save = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)
        trainer_of(-1, unfreeze, average, save, max_epochs=epochs).fit(module, loader(), weights_only=True, **options)
        return module, average

    module, average = run(4, "whole")
    assert "backbone.weight" in average.average
    assert not torch.equal(module.backbone.weight, torch.ones(1, 1))
    content = torch.load(tmp_path / "whole/epoch=2.ckpt", weights_only=True)
    assert content["current_model_state"].keys() == {"backbone.weight", "head.weight"}
    _, resumed = run(4, "resumed", ckpt_path=tmp_path / "whole/epoch=1.ckpt")
    for name, tensor in average.average.items():
        torch.testing.assert_close(resumed.average[name], tensor)
    run(4, "resumed", ckpt_path=tmp_path / "whole/epoch=2.ckpt")


def test_a_checkpoint_without_a_part(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "a", every_n_train_steps=4)
    trainer_of(4, WeightAverage(0.8), save).fit(Net(), loader())
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        del content[key]["head.weight"]
    torch.save(content, tmp_path / "stripped.ckpt")
    module = Net()
    module.strict_loading = False
    average = WeightAverage(0.8)
    trainer_of(8, average).fit(module, loader(), ckpt_path=tmp_path / "stripped.ckpt", weights_only=True)
    assert average.step == 8


def test_several_averages(tmp_path: Path) -> None:
    def run(steps: int, *averages: WeightAverage, **options: Any) -> dict[str, Tensor]:
        module = Net()
        folder = tmp_path / str(len(averages))
        save = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer_of(steps, *averages, save).fit(module, loader(), weights_only=True, **options)
        return weights(module)

    alone = WeightAverage(0.9)
    run(8, alone)
    both = WeightAverage(0.5), WeightAverage(0.9)
    ended = run(8, *both)
    resumed = WeightAverage(0.5), WeightAverage(0.9)
    assert same(run(8, *resumed, ckpt_path=tmp_path / "2/step=4.ckpt"), ended)
    assert same(ended, both[0].average), "the first is the one that counts"
    for average in (both[1], resumed[1]):
        assert same(average.average, alone.average)


@pytest.mark.parametrize("key", ["same", "changed", "older"])
def test_the_step_is_found_under_every_key(tmp_path: Path, key: str) -> None:
    """Also where the settings have been changed, and in checkpoints from before there could be several averages."""
    save = ModelCheckpoint(tmp_path, "a", every_n_train_steps=4)
    first = WeightAverage(0.8, start_step=2)
    trainer_of(4, first, save).fit(Net(), loader())
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    if key == "older":
        content["callbacks"]["WeightAverage"] = {"step": content["callbacks"].pop(first.state_key)["step"]}
    torch.save(content, tmp_path / "b.ckpt")
    average = WeightAverage(0.9 if key == "changed" else 0.8, start_step=2)
    trainer_of(5, average).fit(Net(), loader(), ckpt_path=tmp_path / "b.ckpt", weights_only=True)
    assert average.step == 5
    decay = 0.9 if key == "changed" else 0.8
    before, after = content["state_dict"]["head.weight"], average.average["head.weight"]
    assert not torch.equal(before, after)
    raw = average._ended["head.weight"]
    torch.testing.assert_close(after, decay * before + (1 - decay) * raw)
