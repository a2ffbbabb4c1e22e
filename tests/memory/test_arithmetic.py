"""The plan's arithmetic, and the step that is run without memory against one that is run with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewurst import UsageError
from rewurst.callbacks.fsdp.blocks import recompute
from rewurst.memory.arithmetic import RESERVE, Layout, Weight, extrapolate, largest_micro_batch, plan
from rewurst.memory.simulation import LiveBytes, StepBytes, simulate, state_bytes, without_memory
from rewurst.memory.steps import planned
from rewurst.modules import CausalLM

STEP = StepBytes(forward=500, kept=400, backward=450, with_gradients=600, gradients=100)
WEIGHTS = [
    Weight((10, 5), 4, states=400),  # outside of blocks: 200 bytes
    Weight((7, 5), 4, states=280, block=0),  # 140
    Weight((7, 5), 4, states=280, block=1),
    Weight((10,), 4, trained=False, whole=True),  # 40
]
SINGLE = {"parameters": 520, "gradients": 480, "states": 960}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        # The forward pass holds all gradients and 500; the backward pass would hold 100 of gradients and 500.
        (Layout(), SINGLE | {"buffers": 0, "copies": 30, "logits": 50, "activations": 450, "peak_in": "forward"}),
        (Layout(averaged=True), SINGLE | {"copies": 30 + 480}),
        (Layout(8, "ddp"), SINGLE | {"buffers": 480}),
        (Layout(8, "ddp", bucket_views=True), SINGLE | {"buffers": 0}),
        # Shards of 2 processes: 5 of 10 and 4 of 7 rows, the frozen one whole. In backward: twice what is outside
        # (weights and gradients), three blocks, a block's gradients, and these again to be reduced.
        (
            Layout(2, "fsdp"),
            {"parameters": 100 + 80 + 80 + 40, "gradients": 260, "states": 200 + 160 + 160}
            | {"buffers": 2 * 200 + 3 * 140 + 140 + 140, "activations": 450, "logits": 0, "peak_in": "backward"},
        ),
        (Layout(2, "fsdp", gathered_itemsize=2), {"buffers": 2 * 100 + 3 * 70 + 70 + 140, "peak_in": "backward"}),
        (Layout(2, "fsdp", reshard=False), {"buffers": 2 * 200 + 2 * 140 + 140 + 140 + 140}),
        (Layout(4, "fsdp", replicas=2), {"parameters": 300}),
        (Layout(2, "fsdp", offload=True), {"parameters": 40, "gradients": 0, "states": 0}),
    ],
)
def test_parts_of_a_plan(layout: Layout, expected: dict[str, Any]) -> None:
    found = plan(WEIGHTS, STEP, layout, beside=30, logits=50)
    assert {key: getattr(found, key) for key in expected} == expected
    assert found.total == sum(getattr(found, key) for key in vars(found) if key != "peak_in")


def test_gradients_that_accumulate_are_there_in_the_backward_pass() -> None:
    step = StepBytes(forward=100, kept=100, backward=300, with_gradients=310, gradients=20)
    cleared = plan(WEIGHTS, step, Layout())
    assert (cleared.gradients, cleared.activations, cleared.peak_in) == (480, 100, "forward")
    adding = plan(WEIGHTS, step, Layout(accumulates=True))
    assert (adding.gradients, adding.activations, adding.peak_in) == (480, 300, "backward")
    stepping = plan(WEIGHTS, step, Layout(), workspace=1000)
    assert (stepping.activations, stepping.peak_in) == (1000, "step")


def test_fits_with_a_reserve() -> None:
    found = plan(WEIGHTS, STEP, Layout())
    needed = found.total / (1 - RESERVE)
    assert found.fits(int(needed) + 2)
    assert not found.fits(int(needed) - 2)


@pytest.mark.parametrize(("slope", "fixed", "limit"), [(7, 100, 99), (7, 100, 107), (7, 100, 1000), (1, 0, 12345)])
def test_the_largest_micro_batch(slope: int, fixed: int, limit: int) -> None:
    found = largest_micro_batch(lambda rows: fixed + slope * rows, limit)
    assert found == max((limit - fixed) // slope, 0)


def language_model(**options: Any) -> dict[str, Any]:
    settings = {"model_type": "gpt_neox", "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    return {"class_path": "CausalLM", "init_args": {"model": settings, "optimizer": "adamw", **options}}


DATA = {"class_path": "TextDataModule", "init_args": {"sequence_length": 64}}


def step_without_memory(rows: int, every: int | None = None) -> StepBytes:
    with without_memory() as live:
        built = planned(language_model(), DATA, False)
        if every is not None:
            model: Any = built.module.get_submodule("model.gpt_neox.layers")
            recompute(list(model), every)
        return simulate(live, built.module, lambda: built.loss(rows), False)


@pytest.mark.parametrize("rows", [4, 16])
def test_a_step_without_memory_takes_what_one_with_memory_does(rows: int) -> None:
    expected = step_without_memory(rows)
    with LiveBytes() as live:
        module = CausalLM(language_model()["init_args"]["model"])
        module._find_head()
        found = simulate(live, module, lambda: module.loss(torch.zeros(rows, 65, dtype=torch.long)), False)
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.01), name


def test_recomputed_blocks_keep_less_and_larger_batches_are_in_proportion() -> None:
    plain, recomputed = step_without_memory(16), step_without_memory(16, 1)
    assert recomputed.kept < 0.6 * plain.kept
    halves = {rows: step_without_memory(rows) for rows in (16, 32)}
    larger = step_without_memory(64)
    for name, value in vars(extrapolate(halves, 64)).items():
        assert value == pytest.approx(getattr(larger, name), rel=0.02), name


def test_gradients_of_a_chain_are_counted_as_they_appear() -> None:
    with without_memory() as live:
        module = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(3)))
        found = simulate(live, module, lambda: module(torch.zeros(10, 100)).sum(), False)
    weight, layer = 4 * 100 * 100, 4 * 10 * 100
    assert found.kept == 3 * layer + 4  # inputs of three layers; the output is let go, the loss is there
    assert found.gradients in (2 * weight, 3 * weight)
    assert 3 * weight <= found.with_gradients <= 3 * weight + 5 * layer


@pytest.mark.parametrize(
    ("name", "share"),
    [("adamw", 8.0), ("lion", 4.0), ("adamw_8bit", 2 + 8 / 256), ("lion_8bit", 1 + 4 / 256), ("muon", 8.0)],
)
def test_bytes_of_states(name: str, share: float) -> None:
    with without_memory():
        built = planned(language_model(optimizer=name), DATA, False)
        states = state_bytes(built.optimizers[0])
        head = built.module.get_parameter("model.lm_head.weight")
        embedding = built.module.get_parameter("model.gpt_neox.embed_in.weight")
        matrix = built.module.get_parameter("model.gpt_neox.layers.0.mlp.dense_h_to_4h.weight")
    assert states[head] == share * head.numel()
    assert states[embedding] == (4 if "lion" in name else 8) * embedding.numel()
    assert states[matrix] == (8 if "adamw" in name else 4) * matrix.numel()


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(UsageError, match=r"^plan knows CausalLM, StageA, StageB, StageC; what a step of Other"):
        planned({"class_path": "my.Other", "init_args": {}}, DATA, False)
    with pytest.raises(UsageError, match=r"^data ImageTextDataModule has no sequence_length"):
        planned(language_model(), {"class_path": "ImageTextDataModule", "init_args": {}}, False)
