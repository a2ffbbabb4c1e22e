"""Averaged weights: their values, where they replace the weights, and that a stopped run resumes with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.callbacks import WeightAverage

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader is not resumable.*",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
)


class Net(LightningModule):
    """Module with a trained layer with BatchNorm and a frozen one; ``optimizers_count`` 2 gives each an optimizer."""

    def __init__(self, optimizers_count: int = 1, accumulation: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)
        self.optimizers_count, self.accumulation = optimizers_count, accumulation
        self.automatic_optimization = optimizers_count == 1
        self.history: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def loss(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.head(self.body(self.frozen(batch))).square().mean()
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch)
        self.manual_backward(self.loss(batch))
        if (batch_idx + 1) % self.accumulation == 0:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()  # type: ignore[operator]
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(copied(self))

    def configure_optimizers(self) -> Any:
        if self.optimizers_count == 1:
            return torch.optim.SGD([*self.body.parameters(), *self.head.parameters()], lr=0.1)
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Record(Callback):
    """Callback that keeps the weights after each global batch, before an average replaces them."""

    def __init__(self, every: int = 1) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.every == 0:
            pl_module.history.append(copied(pl_module))


def fit(module: Net, steps: int, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    data = torch.randn(200, 2, 3, generator=torch.Generator().manual_seed(1))
    begin = 0 if ckpt_path is None else torch.load(ckpt_path, weights_only=True)["global_step"]
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_model_summary=False, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **{"val_check_interval": 3, **options},
    )  # fmt: skip
    train = DataLoader(list(data[begin:]), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, train, DataLoader(list(data[:1]), batch_size=None), ckpt_path=ckpt_path, weights_only=True)  # type: ignore[arg-type]
    return trainer


def expected(history: list[dict[str, Tensor]], decay: float, every: int, start: int) -> dict[str, Tensor]:
    """Compute the average independently in float64."""
    average: dict[str, Tensor] = {}
    for step, weights in enumerate(history, 1):
        for name, tensor in weights.items():
            if step <= start or (step % every == 0 and not tensor.is_floating_point()):
                average[name] = tensor.double()
            elif step % every == 0:
                average[name] = decay * average[name] + (1 - decay) * tensor.double()
    return average


@pytest.mark.parametrize(("every", "start"), [(1, 1), (2, 3), (3, 2), (1, 100)])
@pytest.mark.parametrize(("optimizers", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_copies_until_the_start_then_averages(every: int, start: int, optimizers: int, accumulation: int) -> None:
    module = Net(optimizers, accumulation)
    average = WeightAverage(0.8, every, start)
    options = {"accumulate_grad_batches": accumulation} if optimizers == 1 else {}
    fit(module, 8 * optimizers, average, Record(accumulation), **options)
    assert average.step == len(module.history) == 8
    wanted = expected(module.history, 0.8, every, start)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-7)
    assert not any("frozen" in name for name in average.average), "what is frozen is not copied"


def test_validation_sees_the_average_and_training_does_not() -> None:
    module, plain = Net(), Net()
    fit(module, 7, WeightAverage(0.9), Record())
    fit(plain, 7, Record())
    for with_average, without in zip(module.history, plain.history, strict=True):
        assert all(torch.equal(with_average[name], without[name]) for name in without), "training goes its own way"
    begun = copied(Net())
    history = [begun, *module.history]
    average = {name: tensor.double() for name, tensor in begun.items()}
    for weights in history[1:4]:
        for name, tensor in weights.items():
            average[name] = 0.9 * average[name] + 0.1 * tensor if tensor.is_floating_point() else tensor.double()
    for name, tensor in module.validated[0].items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_resumed_run_ends_on_the_same_bits(tmp_path: Path, stop: int) -> None:
    def save(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1)

    whole, resumed = Net(), Net()
    fit(whole, 9, save("whole"), WeightAverage(0.7, 2, 3))
    fit(resumed, 9, WeightAverage(0.7, 2, 3), save("resumed"), ckpt_path=tmp_path / "whole" / f"step={stop}.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    contents = [torch.load(tmp_path / name / "step=9.ckpt", weights_only=True) for name in ("whole", "resumed")]
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(contents[0][key][name], contents[1][key][name]) for name in contents[0][key])


def test_a_checkpoint_holds_the_average_and_the_weights(tmp_path: Path) -> None:
    module = Net()
    average = WeightAverage(0.7)
    # Saved by a callback that stands before the average in the list.
    fit(module, 4, Record(), ModelCheckpoint(tmp_path, "a", every_n_train_steps=4), average)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["state_dict"].keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(content["state_dict"][name], tensor)
        if "frozen" not in name:
            assert torch.equal(content["current_model_state"][name], module.history[-1][name])
    assert not any("frozen" in name for name in content["current_model_state"])
    fresh = Net()
    fresh.load_state_dict(content["state_dict"])
    Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False).validate(
        fresh,
        DataLoader(list(torch.zeros(1, 2, 3)), batch_size=None),
        verbose=False,  # type: ignore[arg-type]
    )


def test_low_precision_is_averaged_in_float32(tmp_path: Path) -> None:
    module = Net().bfloat16()
    average = WeightAverage(0.999)
    fit(module, 5, average, ModelCheckpoint(tmp_path, "a", every_n_train_steps=5), precision="bf16-true")
    assert {t.dtype for t in average.average.values() if t.is_floating_point()} == {torch.float32}
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["averaging_state"]["head.weight"].dtype == torch.float32
    assert content["state_dict"]["head.weight"].dtype == torch.bfloat16


def test_it_is_lightnings_and_begins_where_a_checkpoint_has_no_average(tmp_path: Path) -> None:
    assert issubclass(WeightAverage, WeightAveraging)
    fit(Net(), 3, ModelCheckpoint(tmp_path, "a", every_n_train_steps=3))
    average, module = WeightAverage(0.5), Net()
    fit(module, 5, average, Record(), ckpt_path=tmp_path / "a.ckpt")
    assert average.step == 5
    begun = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["head.weight"]
    first, second = (weights["head.weight"] for weights in module.history)
    torch.testing.assert_close(module.head.weight.detach(), 0.5 * (0.5 * begun + 0.5 * first) + 0.5 * second)


@pytest.mark.parametrize("arguments", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}, {"start_step": -1}])
def test_numbers_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"WeightAverage: .* must"):
        WeightAverage(**arguments)
