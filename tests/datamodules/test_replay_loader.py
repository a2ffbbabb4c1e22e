"""Replay of any map-style datasets: an exact share, any batch structure, resumed with the next sample."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rewurst import UsageError
from rewurst.callbacks import Constant as ConstantRate
from rewurst.callbacks import ExactResume, Forgetting, LRRewarming, ReplayScheduler, WarmupLinear
from rewurst.datamodules import ReplayLoader

pytestmark = pytest.mark.filterwarnings(
    "ignore:corpus .* is read again",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
)


class Numbers(Dataset[Any]):
    """Tells its samples by sign, and adds noise from the global generators."""

    def __init__(self, sign: int, kind: str, size: int = 23) -> None:
        self.sign, self.kind, self.size = sign, kind, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        value = torch.tensor([self.sign * (index + 1.0), float(torch.rand(())), float(np.random.rand())])
        return {"tensor": value, "tuple": (value, index), "dict": {"x": {"value": value}}}[self.kind]


class Notes(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[float]]] = []

    def value(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            assert batch.keys() == {"x"}, "nothing is added to a project's batch"
            batch = batch["x"]["value"]
        return batch if isinstance(batch, Tensor) else batch[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(self.value(batch).tolist())
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss/old", self.weight, batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data_of(kind: str = "tensor", workers: int = 0, **options: Any) -> ReplayLoader:
    new = DataLoader(Numbers(1, kind), batch_size=4, num_workers=workers)
    val = DataLoader(Numbers(-1, kind), batch_size=8)
    return ReplayLoader("new", new, {"old": DataLoader(Numbers(-1, kind, 11))}, val={"old": val}, **options)


def fit(
    data: ReplayLoader, *callbacks: Any, steps: int = 20, share: Any = 0.3, **options: Any
) -> tuple[Notes, Trainer]:
    module = Notes()
    scheduler = share if isinstance(share, ReplayScheduler) else ReplayScheduler(share)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, num_sanity_val_steps=0, val_check_interval=5, check_val_every_n_epoch=None,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=[scheduler, Forgetting(old=["old"]), LRRewarming(ConstantRate(0.1), 20), ExactResume(), *callbacks],
    )  # fmt: skip
    trainer.fit(module, data, weights_only=True, **options)
    return module, trainer


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize(("micro", "workers"), [(8, 0), (4, 0), (4, 2)])
def test_an_exact_share_that_resumes_with_the_next_sample(tmp_path: Path, kind: str, micro: int, workers: int) -> None:
    def build() -> ReplayLoader:
        data = data_of(kind, workers, global_batch_size=8)
        data.micro_batch_size = micro
        return data

    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    whole, trainer = fit(build(), save)
    values = [sample for batch in whole.seen for sample in batch]
    old = [sample for sample in values if sample[0] < 0]
    assert len(values) == 160
    assert len(old) == 48, "exactly 30 %"
    per_step = Counter(index // 8 for index, sample in enumerate(values) if sample[0] < 0)
    assert set(per_step.values()) <= {2, 3}
    assert float(trainer.callback_metrics["replay/share_read"]) == pytest.approx(0.3)
    assert sorted(sample[0] for sample in old[:11]) == list(range(-11, 0)), "every old sample once before any twice"
    assert len({tuple(sample[1:]) for sample in values}) == 160, "randomness is each sample's own"
    resumed, trainer = fit(build(), ckpt_path=tmp_path / "step=14.ckpt")
    assert resumed.seen == whole.seen[14 * 8 // micro :]
    assert float(trainer.callback_metrics["replay/share_read"]) == pytest.approx(0.3)


def test_a_share_that_changes_and_a_dataset_that_follows(tmp_path: Path) -> None:
    share = ReplayScheduler(WarmupLinear(0.5, 0.0, 0.0), 10)
    whole, _ = fit(data_of(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10), share=share, steps=10)
    old = [sum(sample[0] < 0 for sample in batch) for batch in whole.seen]
    assert old[0] == 2
    assert old[-1] <= 1
    assert sum(old) == 11, "4 times the sum of the shares, 0.5 falling to 0.05"
    later = ReplayLoader(
        "later", DataLoader(Numbers(1, "tensor", 50), batch_size=4), {"new": DataLoader(Numbers(-1, "tensor"))}
    )
    module, _ = fit_without_forgetting(later, tmp_path / "step=10.ckpt")
    assert len(module.seen) == 5


def fit_without_forgetting(data: ReplayLoader, ckpt_path: Path) -> tuple[Notes, Trainer]:
    module = Notes()
    trainer = Trainer(
        accelerator="cpu", max_steps=15, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[ReplayScheduler(0.25), LRRewarming(ConstantRate(0.1), 20), ExactResume()],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield torch.zeros(1)


def test_bad_input() -> None:
    loader = DataLoader(Numbers(1, "tensor"), batch_size=4)
    for build, message in (
        (lambda: ReplayLoader("a", DataLoader(Endless(), batch_size=4)), "'a' is an iterable dataset, whose samples"),
        (lambda: ReplayLoader("a", loader, {"a": loader}), "'a' is both new and old"),
        (lambda: ReplayLoader("a", {}), "nothing new to learn"),
        (lambda: ReplayLoader("a", DataLoader(Numbers(1, "tensor"), batch_size=None)), "has no batch_size"),
        (lambda: fit(data_of(global_batch_size=6)), "global_batch_size 6 is not a multiple of micro_batch_size 4"),
    ):
        with pytest.raises(UsageError, match=message):
            build()
