"""One process of the pool that tests of FSDP run their scenarios in.

Reads a line of JSON for each scenario ({"name", "world_size", "port", "arguments"}), runs the function of that name in
a process group of so many, and answers with a line of JSON.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.callbacks import (
    FSDP,
    ExactResume,
    Forgetting,
    LogSamples,
    LRRewarming,
    ReplayScheduler,
    WarmupCosine,
    WeightAverage,
    construct_on_rank_zero,
)
from rewurst.datamodules.text import Corpus, TextDataModule
from rewurst.modules import CausalLM, StageB, StageC
from rewurst.train import main

warnings.filterwarnings("ignore")
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 65,  # shards of unequal size
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
SCENARIOS: dict[str, Callable[..., Any]] = {}


def scenario(function: Callable[..., Any]) -> Callable[..., Any]:
    SCENARIOS[function.__name__] = function
    return function


class Foreign(LightningModule):
    """No ``configure_model``, blocks of torch, a frozen encoder, parameters of its own."""

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


class Beside:
    """As modules hold networks that are no part of them."""

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
    """Global batches of 8 rows, each a function of its number, from the step on that a checkpoint says."""

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
    """A prior with a text encoder that is trained along, on what a frozen compressor makes of images."""
    prior = {"preset": "tiny", "c_in": 4, "c": 32, "c_cond": 16, "nhead": 2}
    text = {"tokenizer": f"{folder}/tokenizer", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 6}
    module = StageC(f"{folder}/compressor", prior, text, latent_mean=None, latent_std=None)
    nn.init.normal_(module.prior.get_parameter("out.1.weight"), std=0.01)  # zeros would hide what is before
    return module


def stage_b(folder: str) -> StageB:
    """A U-Net and a compressor, with BatchNorm, in a frozen Stage A's latents."""
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


@scenario
def losses(
    module: str = "neox",
    strategy: str = "fsdp",
    steps: int = 20,
    folder: str = "",
    accumulation: int = 2,
    settings: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    save: str = "",
    resume: str | None = None,
    **options: Any,
) -> Any:
    """Losses of a run with accumulation and clipping; saved in a folder every 3 steps if asked for."""
    world_size = int(os.environ["WORLD_SIZE"])
    torch._dynamo.utils.counters.clear()
    recorder = Losses()
    of_neox = {"settings": settings or {}, "optimizer": optimizer}
    model = make_module(module, folder, **(of_neox if module == "neox" else {}))
    if module == "neox":
        data = text_data(folder, world_size, accumulation)
    else:
        data = RowData(8 // (world_size * accumulation))
        options |= {"accumulate_grad_batches": accumulation, "gradient_clip_val": 0.05}
    callbacks: list[Callback] = [recorder]
    if save:
        callbacks.append(ModelCheckpoint(f"{folder}/{save}", "{step}", every_n_train_steps=3, save_top_k=-1))
    options = {"limit_val_batches": 0, "enable_checkpointing": bool(save)} | options
    trainer = make_trainer(strategy, steps, callbacks, folder, **options)
    trainer.fit(model, data, ckpt_path=resume)
    sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    parameters = len(list(model.parameters()))
    validated = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    return {
        "losses": recorder.losses,
        "validated": validated,
        "statistics": [t.double().sum().item() for name, t in model.state_dict().items() if "running_" in name],
        "sharded": sharded,
        "parameters": parameters,
        "graphs": graphs,
    }


@scenario
def run(
    folder: str,
    name: str,
    steps: int,
    resume: str | None = None,
    strategy: str = "fsdp",
    settings: dict[str, Any] | None = None,
    dataset: str = "code",
    rewarming: dict[str, Any] | None = None,
    checkpoints: list[dict[str, Any]] | None = None,
    average: bool = True,
    optimizer: str = "adamw",
    gather: str | None = None,
    **options: Any,
) -> Any:
    """A run with everything of ours: re-warming, replay, exact resume, forgetting, averaged weights, checkpoints."""
    recorder = Losses()
    model = make_module("neox", settings=settings or {}, optimizer=optimizer)
    data = text_data(folder, int(os.environ["WORLD_SIZE"]), dataset=dataset, replay=True)
    wanted = checkpoints or [{"every_n_train_steps": 4, "save_top_k": -1}]
    savers = [ModelCheckpoint(**{"dirpath": f"{folder}/{name}", "filename": "{step}"} | one) for one in wanted]
    forgetting = Forgetting(old=["prose"], new=["code"])
    callbacks: list[Callback] = [
        recorder,
        LRRewarming(WarmupCosine(1e-2, 1e-3), 12, **(rewarming or {})),
        ReplayScheduler(0.3),
        ExactResume(world_size_may_change=True),
        forgetting,
        *savers,
    ]
    callbacks += [WeightAverage(decay=0.8)] if average else []
    trainer = make_trainer(
        strategy,
        steps,
        callbacks,
        folder,
        enable_checkpointing=True,
        **({"val_check_interval": 8, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0} | options),
    )
    trainer.fit(model, data, ckpt_path=resume)
    if gather is not None:
        whole = {key: getattr(t, "full_tensor", t.clone)() for key, t in model.state_dict().items()}
        if trainer.is_global_zero:
            torch.save(whole, gather)
    states = trainer.optimizers[0].state.values()
    return {
        "losses": recorder.losses,
        "start": forgetting.start,
        "validation": float(trainer.callback_metrics.get("val/loss/code", 0)),
        "counts": sorted({float(state["step"]) for state in states if "step" in state}),
        "in_8_bits": sum(t.dtype == torch.uint8 for state in states for t in (state.get("exp_avg"),) if t is not None),
    }


@scenario
def pictures(folder: str, **options: Any) -> Any:
    """Validation that draws, between steps."""
    recorder = Losses()
    callbacks: list[Callback] = [recorder, LogSamples(samples=3)]
    options = {"val_check_interval": 2, "limit_val_batches": 4, "num_sanity_val_steps": 0} | options
    make_trainer("fsdp", 4, callbacks, folder, **options).fit(make_module("foreign"), RowData(2))
    return {"losses": recorder.losses}


@scenario
def built_on_rank_zero(nobody: bool = False, hybrid: bool = False) -> Any:
    """Whether weights and buffers are those of a module that every process built whole."""
    whole = make_module("neox")
    seed_everything(0)
    with torch.device("meta") if nobody else construct_on_rank_zero():
        model = CausalLM(NEOX)
    empty = sum(tensor.is_meta for tensor in model.parameters())
    trainer = make_trainer("hybrid" if hybrid else "fsdp", 0, [], limit_val_batches=0)
    trainer.fit(model, RowData(1))
    expected = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert own.keys() == expected.keys()
    equal = [torch.equal(getattr(own[n], "full_tensor", own[n].clone)(), expected[n]) for n in expected]
    return {"equal": all(equal), "inv_freq": any("inv_freq" in n for n in own), "empty": empty}


@scenario
def refused(what: str, folder: str = "") -> Any:
    """Wrong use, which has to raise in every process."""
    model, options = make_module("foreign"), {}
    if what == "blocks":
        options["blocks"] = ["TransformerEncoderLayers"]
    elif what == "replicas":
        options["replicas"] = 3
    elif what == "manual":
        model.automatic_optimization = False
    elif what == "no blocks":
        model.encoder = nn.Linear(16, 16)
    elif what == "frozen":
        model.beside = Beside(nn.Linear(2, 2, device="meta" if os.environ["RANK"] == "1" else None))  # type: ignore[assignment]
    elif what == "bitsandbytes":
        foreign = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "bitsandbytes.optim.adamw"})
        model.configure_optimizers = lambda: foreign(model.parameters())  # type: ignore[method-assign]
    elif what == "optimizer":
        model.configure_optimizers = lambda: torch.optim.LBFGS(model.parameters())  # type: ignore[method-assign]
    make_trainer("fsdp", 1, [], **options).fit(model, RowData(1))


@scenario
def pid() -> int:
    return os.getpid()


@scenario
def script(path: str, args: list[str]) -> str:
    """What a script prints, run as if it were called."""
    with redirect_stdout(io.StringIO()) as said, patch.object(sys, "argv", [path, *args]):
        runpy.run_path(path, run_name="__main__")
    return said.getvalue()


class StepLog(Callback):
    """A line for each batch: the step and its loss, to the bit."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        if trainer.is_global_zero:
            with open(self.path, "a") as file:
                file.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")


@scenario
def command_line(args: list[str]) -> int:
    """The exit status of a command."""
    return main(args)


def serve(rank: int, tasks: int, answers: int) -> None:
    """Runs what comes through one pipe and answers through another."""
    while task := read_task(tasks):
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(task["port"]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(task["world_size"]),
            "NODE_RANK": "0",
        }
        try:
            answer = {"ok": SCENARIOS[task["name"]](**task["arguments"])}
        except UsageError as error:
            answer = {"usage": str(error)}
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        if distributed.is_initialized():
            distributed.destroy_process_group()
        os.write(answers, json.dumps(answer).encode() + b"\n")


def read_task(tasks: int) -> Any:
    """The next line, and nothing of the one after it: another process may come to read that."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(tasks, 1)):
            return None
        line += byte
    return json.loads(line)


if __name__ == "__main__":
    # Importing takes longer than most scenarios, so it is done once, and the processes are forked.
    torch.set_num_threads(1)
    pipes = [int(number) for number in sys.argv[1:]]
    waiting = list(range(len(pipes) // 2))
    children: dict[int, int] = {}
    while waiting or children:
        for rank in waiting:
            if (child := os.fork()) == 0:
                serve(rank, *pipes[2 * rank : 2 * rank + 2])
                os._exit(0)
            children[child] = rank
        ended, status = os.wait()
        rank = children.pop(ended)
        waiting = [rank] if os.WIFSIGNALED(status) else []
