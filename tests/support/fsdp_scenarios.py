"""Scenarios that a process group of :mod:`fsdp_worker` runs, by name."""

from __future__ import annotations

import io
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import torch
from fsdp_parts import NEOX, Losses, RowData, Sibling, make_module, make_trainer, text_data
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor

from rewurst.callbacks import (
    ExactResume,
    Forgetting,
    LogSamples,
    LRRewarming,
    ReplayScheduler,
    WarmupCosine,
    WeightAverage,
    construct_on_rank_zero,
)
from rewurst.modules import CausalLM
from rewurst.train import main

SCENARIOS: dict[str, Callable[..., Any]] = {}


def scenario(function: Callable[..., Any]) -> Callable[..., Any]:
    SCENARIOS[function.__name__] = function
    return function


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
    """Return the losses of a run with accumulation and clipping; save every 3 steps if a folder is given."""
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
    """Run with all callbacks: re-warming, replay, exact resume, forgetting, averaged weights, checkpoints."""
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
    """Validate and draw pictures between steps."""
    recorder = Losses()
    callbacks: list[Callback] = [recorder, LogSamples(samples=3)]
    options = {"val_check_interval": 2, "limit_val_batches": 4, "num_sanity_val_steps": 0} | options
    make_trainer("fsdp", 4, callbacks, folder, **options).fit(make_module("foreign"), RowData(2))
    return {"losses": recorder.losses}


@scenario
def built_on_rank_zero(nobody: bool = False, hybrid: bool = False) -> Any:
    """Return whether weights and buffers equal those of a module that every process built whole."""
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
    """Return the error of wrong use, which every process has to raise."""
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
        model.sibling = Sibling(nn.Linear(2, 2, device="meta" if os.environ["RANK"] == "1" else None))  # type: ignore[assignment]
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
    """Run a script as a program and return its output."""
    with redirect_stdout(io.StringIO()) as said, patch.object(sys, "argv", [path, *args]):
        runpy.run_path(path, run_name="__main__")
    return said.getvalue()


class StepLog(Callback):
    """Callback that writes a line per batch with the step and its exact loss."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        if trainer.is_global_zero:
            with open(self.path, "a") as file:
                file.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")


@scenario
def command_line(args: list[str]) -> int:
    """Run a command and return its exit status."""
    return main(args)
