"""Arithmetic of the memory plan."""

from __future__ import annotations

from typing import Any

import pytest

from rewurst.memory.arithmetic import RESERVE, Layout, StepBytes, Weight, extrapolate, largest_micro_batch, plan

STEP = StepBytes(forward=500, kept=400, backward=450, with_gradients=600, gradients=100, extra=30)
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
        (Layout(), SINGLE | {"buffers": 0, "copies": 30, "activations": 500, "peak_in": "forward"}),
        (Layout(averaged=True), SINGLE | {"copies": 30 + 480}),
        (Layout(8, "ddp"), SINGLE | {"buffers": 480}),
        (Layout(8, "ddp", bucket_views=True), SINGLE | {"buffers": 0}),
        # Shards of 2 processes: 5 of 10 and 4 of 7 rows, the frozen one whole. In backward: twice what is outside
        # (weights and gradients), three blocks, a block's gradients, and these again to be reduced.
        (
            Layout(2, "fsdp"),
            {"parameters": 100 + 80 + 80 + 40, "gradients": 260, "states": 200 + 160 + 160}
            | {"buffers": 2 * 200 + 3 * 140 + 140 + 140, "activations": 450, "peak_in": "backward"},
        ),
        (Layout(2, "fsdp", gathered_itemsize=2), {"buffers": 2 * 100 + 3 * 70 + 70 + 140, "peak_in": "backward"}),
        (Layout(2, "fsdp", reshard=False), {"buffers": 2 * 200 + 2 * 140 + 140 + 140 + 140}),
        (Layout(4, "fsdp", replicas=2), {"parameters": 300}),
        (Layout(2, "fsdp", offload=True), {"parameters": 40, "gradients": 0, "states": 0}),
    ],
)
def test_parts_of_a_plan(layout: Layout, expected: dict[str, Any]) -> None:
    found = plan(WEIGHTS, STEP, layout)
    assert {key: getattr(found, key) for key in expected} == expected
    assert found.total == sum(getattr(found, key) for key in vars(found) if key != "peak_in")


def test_accumulated_gradients_count_in_the_backward_pass() -> None:
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


def test_larger_micro_batches_are_extrapolated() -> None:
    known = {4: StepBytes(100, 90, 80, 110, 20, 8, 5), 8: StepBytes(180, 170, 150, 190, 20, 16, 5)}
    assert extrapolate(known, 16) == StepBytes(340, 330, 290, 350, 20, 32, 5)
    assert extrapolate(known, 4) == known[4]
