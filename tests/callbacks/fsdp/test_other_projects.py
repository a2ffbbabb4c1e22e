"""Blocks of modules that other projects write, and checkpoints that are tested in the process that trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from rewurst import UsageError
from rewurst.callbacks import FSDP
from rewurst.callbacks.fsdp import strategy
from rewurst.callbacks.fsdp.blocks import find_blocks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))


def holder(**parts: nn.Module) -> nn.Module:
    return nn.ModuleDict(parts)


@pytest.mark.parametrize(
    ("module", "kinds"),
    [
        (holder(net=nn.Sequential(*[Block() for _ in range(3)])), ["Block"] * 3),
        (holder(net=nn.Sequential(nn.Linear(4, 4), *[Block() for _ in range(2)], nn.LayerNorm(4))), ["Block"] * 2),
        (
            holder(net=nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))),
            ["Sequential"] * 2,
        ),
        (holder(net=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 4))), ["Linear"] * 2),
        (holder(a=nn.ModuleList([Block(), Block()]), b=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), ["Block"] * 2),
    ],
)
def test_alike_modules_of_a_sequence_are_blocks(module: nn.Module, kinds: list[str]) -> None:
    assert [type(block).__name__ for block in find_blocks(module)] == kinds


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU())])
def test_what_does_not_repeat_is_refused(module: nn.Module) -> None:
    with pytest.raises(UsageError, match="has no list or sequence of modules of one class"):
        find_blocks(module)


@pytest.mark.parametrize("stage", [TrainerFn.FITTING, TrainerFn.TESTING, TrainerFn.VALIDATING])
def test_states_of_optimizers_are_asked_for_in_training_only(
    stage: TrainerFn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = nn.Linear(2, 2)
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage))
    fsdp = FSDP()
    monkeypatch.setattr(fsdp, "broadcast", lambda value: value)
    monkeypatch.setattr(type(fsdp), "lightning_module", module)
    fsdp.optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, path)
    assert strategy.load_checkpoint is not None
    if stage == TrainerFn.FITTING:
        with pytest.raises(UsageError, match="weights only"):
            fsdp.load_checkpoint(path)
    else:
        fsdp.load_checkpoint(path)
        assert torch.equal(module.weight, torch.load(path, weights_only=True)["state_dict"]["weight"])
