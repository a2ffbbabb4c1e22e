"""Memory of a device while it trains: arithmetic over what weights, states and a step's activations take.

Everything is in bytes and pure. What a step itself holds comes from :mod:`.simulation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil, prod
from typing import Literal

from .simulation import StepBytes

RESERVE = 0.1
"""Share left free: what allocators lose between tensors, kernels' workspaces, a GPU's own context."""


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        shape: Of the whole.
        itemsize: Bytes of an element.
        trained: Whether it has a gradient and states.
        states: Bytes of its optimizer states.
        block: Which block it is part of, none outside of all.
        whole: Whether it is held whole whatever is sharded.
    """

    shape: tuple[int, ...]
    itemsize: int
    trained: bool = True
    states: int = 0
    block: int | None = None
    whole: bool = False

    @property
    def elements(self) -> int:
        """Of the whole."""
        return prod(self.shape)

    def held(self, shards: int) -> int:
        """Elements that the process with the largest part holds: rows are dealt out in equal chunks, rounded up."""
        if self.whole or not self.shape:
            return self.elements
        return ceil(self.shape[0] / shards) * prod(self.shape[1:])


@dataclass(frozen=True)
class Layout:
    """How training is laid out over devices.

    Attributes:
        devices: How many.
        strategy: Of them.
        replicas: Whole copies under FSDP; each is sharded over ``devices / replicas``.
        gathered_itemsize: Bytes of an element in which FSDP gathers; by default the weights' own.
        reduced_itemsize: And in which it sums gradients.
        reshard: Whether blocks are let go after forward.
        offload: Whether shards, gradients and states lie in the host's memory.
        accumulates: Whether a global batch is several micro-batches.
        averaged: Whether an average of the trained weights lies beside them.
        bucket_views: Whether DDP's gradients lie in its buckets.
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
        """Processes that share one copy of the weights."""
        return self.devices // self.replicas if self.strategy == "fsdp" else 1


@dataclass(frozen=True)
class MemoryPlan:
    """What a device holds when it holds most, by what it is for.

    Attributes:
        parameters: Its part of the weights.
        gradients: Of them.
        states: The optimizer's.
        copies: Averaged weights, frozen networks.
        buffers: What DDP or FSDP gathers and reduces in.
        activations: And temporary tensors; of the optimizer, if the peak is in its step.
        peak_in: When that is.
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
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "peak_in")

    def fits(self, memory: int) -> bool:
        """Whether it fits, with :data:`RESERVE` left."""
        return self.total <= memory * (1 - RESERVE)


def plan(
    weights: Sequence[Weight],
    step: StepBytes,
    layout: Layout,
    workspace: int = 0,
) -> MemoryPlan:
    """Memory of the device that holds most, when it does.

    Three times are looked at: the end of the forward pass, when gradients of the step before are still there (Lightning
    clears them between the two passes); the backward pass; the optimizer's step.

    Args:
        weights: All parameters of the module.
        step: What one micro-batch takes, computed with the weights as they are gathered.
        layout: Over the devices.
        workspace: Bytes that the optimizer's step holds for a moment.
    """
    own = _held(weights, layout)
    parameters, gradients, states = (0, 0, 0) if layout.offload else own
    frozen = sum(w.elements * w.itemsize for w in weights if w.whole)
    average = own[0] - frozen if layout.averaged else 0
    if layout.offload:
        parameters = frozen
    copies = step.beside + average
    forward_buffers, backward_buffers = _buffers(weights, layout)
    # Under FSDP a gradient is reduced when its block is done, into a shard that is there or soon will be.
    full = layout.accumulates or layout.strategy == "fsdp"
    held, of_step = (gradients, step.backward) if full else (step.gradients, step.with_gradients - step.gradients)
    moments = [
        MemoryPlan(parameters, gradients, states, copies, forward_buffers, step.forward, "forward"),
        MemoryPlan(parameters, held, states, copies, backward_buffers, of_step, "backward"),
        MemoryPlan(parameters, gradients, states, copies, _at_rest(weights, layout), workspace, "step"),
    ]
    return max(moments, key=lambda moment: moment.total)


def _held(weights: Iterable[Weight], layout: Layout) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and states of the process with the largest shards."""
    parameters = gradients = states = 0
    for weight in weights:
        held = weight.held(layout.shards)
        parameters += held * weight.itemsize
        if weight.trained:
            gradients += held * weight.itemsize
            states += weight.states * held // max(1, weight.elements)
    return parameters, gradients, states


def _at_rest(weights: Sequence[Weight], layout: Layout) -> int:
    """DDP's buckets, which are always there."""
    if layout.strategy != "ddp" or layout.bucket_views:
        return 0
    return sum(weight.elements * weight.itemsize for weight in weights if weight.trained)


def _buffers(weights: Sequence[Weight], layout: Layout) -> tuple[int, int]:
    """What a strategy holds in the forward and in the backward pass.

    FSDP: what is outside of blocks is gathered for the whole step, and its gradients stay whole until its end. Of
    blocks there are the one that computes, and the next one, gathered into one flat tensor and copied out of it; in
    backward also the gradients of one, and the flat tensor in which they are reduced.
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
    """A step's bytes at another micro-batch, on the straight line through those of two.

    Beyond a chunk of the loss everything that a step holds grows with the micro-batch in proportion.
    """
    (a, first), (b, second) = sorted(at.items())
    share = (micro_batch_size - a) / (b - a)
    pairs = ((getattr(first, field.name), getattr(second, field.name)) for field in fields(StepBytes))
    return StepBytes(*(round(x + share * (y - x)) for x, y in pairs))


def largest_micro_batch(total: Callable[[int], int], limit: float) -> int:
    """The largest micro-batch of which the total stays within a limit; 0 if that of a single row does not.

    Args:
        total: Bytes by micro-batch, growing.
        limit: In bytes.
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
