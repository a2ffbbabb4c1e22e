"""Modules as other projects write them, and a run of each with our callbacks; as a script, on several processes."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from rewurst.callbacks import (
    ExactResume,
    LogSamples,
    LRRewarming,
    SaveOnSignal,
    StepProgressBar,
    Throughput,
    WarmupCosine,
    WeightAverage,
)

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BATCHES = 8  # micro-batches of an epoch on each process


class Pictures(Dataset[Any]):
    """Pictures of 3 x 2 x 2 pixels in the structure of a project's batches."""

    def __init__(self, kind: str, rank: int) -> None:
        self.kind, self.rank = kind, rank

    def __len__(self) -> int:
        return 2 * BATCHES

    def __getitem__(self, index: int) -> Any:
        image = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(100 * self.rank + index))
        if self.kind == "tuple batches":
            return image, torch.tensor(index)
        if self.kind == "dict batches":
            return {"inputs": {"image": image}, "caption": f"picture {index}"}
        return image


class Project(LightningModule):
    """Base of the projects: a small network with dropout and a loss."""

    def __init__(self, accumulation: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.accumulation = accumulation
        self.net: Any = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 12))

    def image(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return batch["inputs"]["image"]  # type: ignore[no-any-return]
        return batch if isinstance(batch, Tensor) else batch[0]

    def loss(self, batch: Any) -> Tensor:
        flat = self.image(batch).flatten(1)
        return (self.net(flat) - flat).square().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.loss(batch), sync_dist=True, batch_size=4)

    def draw_samples(self, batch: Any) -> dict[str, Tensor]:
        image = self.image(batch)
        return {"original": image, "drawn": self.net(image.flatten(1)).reshape(image.shape).clamp(0, 1)}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class TwoOptimizers(Project):
    """Steps each half by itself, after as many micro-batches as it likes."""

    def __init__(self, accumulation: int) -> None:
        super().__init__(accumulation)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / self.accumulation)
        if (batch_idx + 1) % self.accumulation == 0:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), lr=lr) for part, lr in ((self.net[0], 0.01), (self.net[2], 0.02))]


class RawOptimizer(Project):
    """Goes around Lightning's wrapper of the optimizer."""

    def __init__(self, accumulation: int) -> None:
        super().__init__(accumulation)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(self.loss(batch) / self.accumulation)
        if (batch_idx + 1) % self.accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()


class Compiled(Project):
    """Has a compiled part."""

    def __init__(self, accumulation: int) -> None:
        super().__init__(accumulation)
        self.net = torch.compile(self.net, backend="eager")


class Lora(Project):
    """Trains adapters of peft next to frozen weights."""

    def __init__(self, accumulation: int) -> None:
        super().__init__(accumulation)
        from peft import LoraConfig, get_peft_model

        self.net = get_peft_model(self.net, LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.5))


PROJECTS: dict[str, type[Project]] = {
    "automatic": Project,
    "two optimizers": TwoOptimizers,
    "tuple batches": Project,
    "dict batches": Project,
    "several loaders": Project,
    "raw optimizer": RawOptimizer,
    "compiled": Compiled,
    "lora": Lora,
}


class SaveAt(Callback):
    """Saves after a number of micro-batches."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)


def run(kind: str, folder: Path, accumulation: int, save_at: int = 0, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Train two epochs and return what came of it."""
    if RANKS > 1:
        os.environ["WORLD_SIZE"] = str(RANKS)  # Lightning takes it away at the end of a fit
    torch.manual_seed(1 if ckpt_path is None else 7)
    module = PROJECTS[kind](accumulation)
    steps = 2 * BATCHES // accumulation
    rewarming = LRRewarming(WarmupCosine(0.02, 0.002, 0.25), length=steps, dataset="pictures")
    average = WeightAverage(0.7)
    own = [rewarming, average, ExactResume(), Throughput(), LogSamples(1), SaveOnSignal(), StepProgressBar()]
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy="ddp" if RANKS > 1 else "auto", max_epochs=2, logger=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        accumulate_grad_batches=accumulation if module.automatic_optimization else 1, default_root_dir=folder,
        callbacks=[*own, *([SaveAt(save_at, folder / "a.ckpt")] if save_at else [])],
    )  # fmt: skip
    train: Any = StatefulDataLoader(Pictures(kind, RANK), batch_size=2, shuffle=True)
    val = DataLoader(Pictures(kind, RANK), batch_size=4)
    loaders: Any = {"seen": val, "again": DataLoader(Pictures(kind, 9), batch_size=4)} if "several" in kind else val
    trainer.fit(module, train, loaders, ckpt_path=ckpt_path, weights_only=True)
    return {
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "average": {name: tensor.clone() for name, tensor in average.average.items()},
        "steps": (rewarming.step, average.step, steps),
        "lr": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
    }


def compare(kind: str, folder: Path, accumulation: int, stop: int) -> None:
    """Assert that a run that is stopped ends on the bits of one that is not, and that its average was saved."""
    whole = run(kind, folder, accumulation, save_at=stop)
    content = torch.load(folder / "a.ckpt", weights_only=True)
    raw = content["current_model_state"]
    assert raw, "the weights being trained are kept"
    assert all("lora" in name for name in raw) or kind != "lora", "frozen weights take no copy"
    assert any(not torch.equal(content["state_dict"][name], tensor) for name, tensor in raw.items())
    resumed = run(kind, folder, accumulation, ckpt_path=folder / "a.ckpt")
    for part in ("weights", "average"):
        assert whole[part].keys() == resumed[part].keys()
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), f"{kind}: {part} {name}"
    assert whole["steps"] == resumed["steps"] == (whole["steps"][2],) * 3
    assert whole["lr"] == resumed["lr"]
    assert all(torch.equal(whole["weights"][name], tensor) for name, tensor in whole["average"].items())
    pictures = 2 if "several" in kind else 1
    assert len(list((folder / "samples").glob("*.png"))) == 2 * pictures or RANK


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for project in PROJECTS:
        compare(project, Path(sys.argv[1]) / project, int(sys.argv[2]), 2 * int(sys.argv[2]))
        print("ok", project)
