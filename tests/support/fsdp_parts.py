"""Modules, data and trainers for the scenarios of FSDP."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

from rewurst.callbacks import (
    FSDP,
)
from rewurst.datamodules.text import Corpus, TextDataModule
from rewurst.modules import CausalLM, StageB, StageC

NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 65,  # shards of unequal size
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


class Foreign(LightningModule):
    """Foreign module without ``configure_model``, with torch's blocks, a frozen encoder and its own parameters."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.shift = nn.Parameter(torch.zeros(16))
        self.head = nn.Linear(16, 1)
        self.frozen = nn.Linear(16, 16).requires_grad_(not frozen)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden = self.encoder(self.frozen(batch["x"].flatten(2).transpose(1, 2)) + self.shift)
        return (self.head(hidden) - batch["t"][:, None, None]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), sync_dist=True)

    def draw_samples(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.encoder(batch["x"].flatten(2).transpose(1, 2) + self.shift)
        return {"drawn": self.head(hidden).expand(-1, -1, 3).transpose(1, 2).unflatten(2, (4, 4))}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Sibling:
    """Holder of a network that is not a submodule."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Rows:
    def __init__(self, first: int, count: int, every: int, size: int) -> None:
        self.first, self.count, self.every, self.size = first, count, every, size

    def __len__(self) -> int:
        return 100 * self.count // self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        per_step = self.count // self.size
        begin = index // per_step * self.every + self.first + index % per_step * self.size
        rows = []
        for row in range(begin, begin + self.size):
            draw = torch.Generator().manual_seed(row)
            rows.append(
                {
                    "x": torch.randn(16, 4, 4, generator=draw),
                    "t": torch.rand((), generator=draw),
                    "image": torch.randint(256, (3, 32, 32), generator=draw, dtype=torch.uint8),
                    "seed": torch.tensor(row),
                }
            )
        captions = [f"row {row}" for row in range(begin, begin + self.size)]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | {"caption": captions}


class RowData(LightningDataModule):
    """Global batches of 8 rows, each a function of its number, starting at the checkpoint's step."""

    def __init__(self, micro_batch_size: int) -> None:
        super().__init__()
        self.micro_batch_size, self.start = micro_batch_size, 0

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["step"]

    def train_dataloader(self) -> Any:
        return self.loader(self.start)

    def val_dataloader(self) -> Any:
        return self.loader(0)

    def loader(self, step: int) -> Any:
        assert self.trainer is not None
        mine = 8 // self.trainer.world_size
        rows = Rows(8 * step + self.trainer.global_rank * mine, mine, 8, self.micro_batch_size)
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


class Losses(Callback):
    """Mean loss of every global batch, over all processes."""

    def __init__(self, at: int | None = None, act: Callable[..., None] | None = None) -> None:
        self.losses: list[float] = []
        self.at, self.act = at, act
        self._window: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self._window.append(outputs["loss"].detach().double())
        if len(self._window) == trainer.accumulate_grad_batches:
            loss = torch.stack(self._window).sum()  # Lightning has divided them by the accumulation
            if distributed.is_initialized():
                distributed.all_reduce(loss)
                loss /= distributed.get_world_size()
            self.losses.append(loss.item())
            self._window = []
            if self.act is not None and trainer.global_step == self.at:
                self.act(trainer, pl_module)


def strategy_of(kind: str, **options: Any) -> Any:
    limit = timedelta(seconds=60)
    if kind == "hybrid":
        return FSDP(replicas=2, timeout=limit, **options)
    return FSDP(timeout=limit, **options) if kind == "fsdp" else kind


def make_trainer(kind: str, steps: int, callbacks: list[Callback], folder: str = ".", **options: Any) -> Trainer:
    own = {key: options.pop(key) for key in list(options) if key in FSDP.__init__.__code__.co_varnames}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": options.pop("enable_checkpointing", False), "default_root_dir": folder}
    return Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy_of(kind, **own),
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        use_distributed_sampler=False,
        **(quiet | options),
    )


def stage_c(folder: str) -> StageC:
    """Return a prior with a trained text encoder, on a frozen compressor's embeddings."""
    prior = {"preset": "tiny", "c_in": 4, "c": 32, "c_cond": 16, "nhead": 2}
    text = {"tokenizer": f"{folder}/tokenizer", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 6}
    module = StageC(f"{folder}/compressor", prior, text, latent_mean=None, latent_std=None)
    nn.init.normal_(module.prior.get_parameter("out.1.weight"), std=0.01)  # zeros would hide what is before
    return module


def stage_b(folder: str) -> StageB:
    """Return a U-Net and a compressor with BatchNorm, in a frozen Stage A's latents."""
    return StageB(f"{folder}/vqgan", {"preset": "tiny", "dropout": [0.0, 0.0]}, "tiny", text_length=4)


def make_module(kind: str, folder: str = "", **options: Any) -> LightningModule:
    seed_everything(0)
    if kind == "stage_b":
        return stage_b(folder)
    if kind == "stage_c":
        return stage_c(folder)
    if kind == "foreign":
        return Foreign()
    settings = {**NEOX, **options.pop("settings", {})}
    return CausalLM(settings, **options)


def text_data(folder: str, world_size: int, accumulation: int = 2, dataset: str = "code", replay: bool = False) -> Any:
    micro = 8 // (world_size * accumulation)
    code, prose = f"{folder}/corpora/code", f"{folder}/corpora/prose"
    corpora, val = {"code": Corpus(code)}, {"code": code}
    if replay:
        corpora["prose"], val["prose"] = Corpus(prose, replay=True), prose
    return TextDataModule(dataset, corpora, val, 8, micro, 8)
