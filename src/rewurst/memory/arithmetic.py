"""Add up a device's memory for weights, optimizer states and a step's activations, in bytes.

All functions are pure. :mod:`.simulation` measures the memory of the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil, prod
from typing import Literal

RESERVE = 0.1
"""Share of the memory to leave free for fragmentation, kernels' workspaces and the GPU's context."""


@dataclass(frozen=True)
class Weight:
    """Size and placement of a parameter.

    Attributes:
        shape: Shape before it is sharded.
        itemsize: Bytes per element.
        trained: Whether it has a gradient and states.
        states: Bytes of its optimizer states.
        block: Number of its block; None outside of blocks.
        whole: Whether every process holds all of it, even under FSDP.
    """

    shape: tuple[int, ...]
    itemsize: int
    trained: bool = True
    states: int = 0
    block: int | None = None
    whole: bool = False

    @property
    def elements(self) -> int:
        """Number of elements before it is sharded."""
        return prod(self.shape)

    def held(self, shards: int) -> int:
        """Return the elements of the largest shard: rows are split into equal chunks, rounded up."""
        if self.whole or not self.shape:
            return self.elements
        return ceil(self.shape[0] / shards) * prod(self.shape[1:])


@dataclass(frozen=True)
class StepBytes:
    """Memory of a forward and backward pass in bytes, without weights, optimizer states and earlier tensors.

    Attributes:
        forward: Peak of the forward pass.
        kept: Bytes left at the end of the forward pass.
        backward: Peak of the backward pass, without gradients.
        with_gradients: Peak of the backward pass with gradients, if there were none before it.
        gradients: Gradients within ``with_gradients``.
        largest: Size of the largest tensor that the step makes.
        extra: Buffers, and frozen networks that the step reads, which are not parameters.
    """

    forward: int
    kept: int
    backward: int
    with_gradients: int
    gradients: int
    largest: int = 0
    extra: int = 0


@dataclass(frozen=True)
class Layout:
    """Layout of training over devices.

    Attributes:
        devices: Number of devices.
        strategy: Kind of distribution.
        replicas: Whole copies under FSDP; each is sharded over ``devices / replicas``.
        gathered_itemsize: Bytes per element that FSDP gathers; the weights' own by default.
        reduced_itemsize: Bytes per element in which FSDP sums gradients.
        reshard: Whether a block's weights are freed after its forward pass.
        offload: Whether shards, gradients and states are in the host's memory.
        accumulates: Whether a global batch has several micro-batches.
        averaged: Whether an average of the trained weights is kept.
        bucket_views: Whether DDP's gradients are views of its buckets.
    """

    devices: int = 1
    strategy: Literal["single", "ddp", "fsdp"] = "single"
    replicas: int = 1
    gathered_itemsize: int | None = None
    reduced_itemsize: int = 4
    reshard: bool = True
    offload: bool = False
    accumulates: bool = False
    averaged: bool = False
    bucket_views: bool = False

    @property
    def shards(self) -> int:
        """Number of processes that share one copy of the weights."""
        return self.devices // self.replicas if self.strategy == "fsdp" else 1


@dataclass(frozen=True)
class MemoryPlan:
    """Peak memory of a device, in bytes.

    Attributes:
        parameters: The device's shards of the weights.
        gradients: Gradients of these.
        states: Optimizer states.
        copies: Averaged weights and frozen networks.
        buffers: Buffers in which DDP or FSDP gathers and reduces.
        activations: Activations and temporary tensors; the optimizer's, if the peak is in its step.
        peak_in: Part of the step in which the peak is.
    """

    parameters: int
    gradients: int
    states: int
    copies: int
    buffers: int
    activations: int
    peak_in: Literal["forward", "backward", "step"]

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "peak_in")

    def fits(self, memory: int) -> bool:
        """Return whether the plan fits with :data:`RESERVE` left free."""
        return self.total <= memory * (1 - RESERVE)


def plan(
    weights: Sequence[Weight],
    step: StepBytes,
    layout: Layout,
    workspace: int = 0,
) -> MemoryPlan:
    """Return the peak of the device with the largest shards.

    The peak is in the forward pass, where gradients of the previous step still exist (Lightning clears them between the
    two passes), in the backward pass or in the optimizer's step.

    Args:
        weights: All parameters of the module.
        step: Bytes of one micro-batch, measured with the weights as they are gathered.
        layout: Layout over the devices.
        workspace: Bytes that the optimizer's step holds temporarily.
    """
    own = _held(weights, layout)
    parameters, gradients, states = (0, 0, 0) if layout.offload else own
    frozen = sum(w.elements * w.itemsize for w in weights if w.whole)
    average = own[0] - frozen if layout.averaged else 0
    if layout.offload:
        parameters = frozen
    copies = step.extra + average
    forward_buffers, backward_buffers = _buffers(weights, layout)
    # Under FSDP a gradient is reduced when its block is done, into a shard that exists or soon will.
    full = layout.accumulates or layout.strategy == "fsdp"
    held, of_step = (gradients, step.backward) if full else (step.gradients, step.with_gradients - step.gradients)
    moments = [
        MemoryPlan(parameters, gradients, states, copies, forward_buffers, step.forward, "forward"),
        MemoryPlan(parameters, held, states, copies, backward_buffers, of_step, "backward"),
        MemoryPlan(parameters, gradients, states, copies, _at_rest(weights, layout), workspace, "step"),
    ]
    return max(moments, key=lambda moment: moment.total)


def _held(weights: Iterable[Weight], layout: Layout) -> tuple[int, int, int]:
    """Return the bytes of parameters, gradients and states in the process with the largest shards."""
    parameters = gradients = states = 0
    for weight in weights:
        held = weight.held(layout.shards)
        parameters += held * weight.itemsize
        if weight.trained:
            gradients += held * weight.itemsize
            states += weight.states * held // max(1, weight.elements)
    return parameters, gradients, states


def _at_rest(weights: Sequence[Weight], layout: Layout) -> int:
    """Return the bytes of DDP's buckets, which are never freed."""
    if layout.strategy != "ddp" or layout.bucket_views:
        return 0
    return sum(weight.elements * weight.itemsize for weight in weights if weight.trained)


def _buffers(weights: Sequence[Weight], layout: Layout) -> tuple[int, int]:
    """Return the bytes of a strategy's buffers in the forward and in the backward pass.

    FSDP gathers the parameters outside of blocks for the whole step and keeps their gradients whole until the end. It
    holds the current block, and the next one twice: gathered into one flat tensor and copied out of it. In the backward
    pass it also holds the gradients of one block and the flat tensor in which they are reduced.
    """
    if layout.strategy != "fsdp":
        return (_at_rest(weights, layout),) * 2
    of_block: dict[int | None, int] = {}
    elements: dict[int | None, int] = {}
    for weight in weights:
        if not weight.whole:
            itemsize = layout.gathered_itemsize or weight.itemsize
            of_block[weight.block] = of_block.get(weight.block, 0) + weight.elements * itemsize
            elements[weight.block] = elements.get(weight.block, 0) + weight.elements
    root, outside = of_block.pop(None, 0), elements.pop(None, 0)
    largest, inside = max(of_block.values(), default=0), max(elements.values(), default=0)
    gathered = 3 * largest if layout.reshard else sum(of_block.values()) + largest
    reduced = max(inside, 0) * layout.reduced_itemsize
    return root + gathered, max(2 * root + gathered + largest + reduced, 2 * root + outside * layout.reduced_itemsize)


def extrapolate(at: Mapping[int, StepBytes], micro_batch_size: int) -> StepBytes:
    """Return a step's bytes at another micro-batch by linear extrapolation from two known ones."""
    (a, first), (b, second) = sorted(at.items())
    share = (micro_batch_size - a) / (b - a)
    pairs = ((getattr(first, field.name), getattr(second, field.name)) for field in fields(StepBytes))
    return StepBytes(*(round(x + share * (y - x)) for x, y in pairs))


def largest_micro_batch(total: Callable[[int], int], limit: float) -> int:
    """Return the largest micro-batch whose total stays within a limit; 0 if none does.

    Args:
        total: Increasing function from a micro-batch to bytes.
        limit: Limit in bytes.
    """
    if total(1) > limit:
        return 0
    fits, fails = 1, 2
    while total(fails) <= limit and fails < 2**30:
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if total(middle) <= limit else (fits, middle)
    return fits
