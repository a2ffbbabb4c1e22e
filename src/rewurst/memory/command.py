"""Whether a config fits a device's memory, before anything is trained."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from .. import UsageError
from ..callbacks.fsdp.blocks import find_blocks, frozen_children, recompute
from ..cli.lightning import parse
from ..cli.parser import Parser
from ..modules.optimizers.eight_bit import EightBitOptimizer
from .arithmetic import RESERVE, Layout, MemoryPlan, Weight, extrapolate, largest_micro_batch, plan
from .simulation import StepBytes, simulate, state_bytes, without_memory
from .steps import Planned, planned

Config = Mapping[str, Any]
DESCRIPTION = "Says what a config takes of a device's memory, whether it fits, and the largest micro-batch that does."
UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
GLIBC = "glibc may take twice that and more in holes between tensors; under MALLOC_MMAP_THRESHOLD_=1048576 it does not"
PRECISIONS = {"32-true": False, "32": False, "None": False, "bf16-mixed": True, "16-mixed": True}


@dataclass(frozen=True)
class Answer:
    """What is said of one layout.

    Attributes:
        layout: The devices.
        recomputed: Every n-th block, none where none is.
        plan: At the config's micro-batch.
        largest: Micro-batch that fits.
        dividing: The largest of those that fit which also divide the global batch.
    """

    layout: Layout
    recomputed: int | None
    plan: MemoryPlan
    largest: int
    dividing: int


def run(args: list[str]) -> None:
    """``plan --config FILE [--config MORE] ... [--devices N ...] [--memory 80GiB]``."""
    known, rest = _parser().parse_known_args(args[1:])
    memory = _bytes(known.memory) if known.memory else None
    config = Configured(parse(["fit", *rest]), known.image_size, memory)
    for text in config.describe():
        print(text)
    for devices in known.devices or [config.devices]:
        print()
        print(table(config.answers(devices), config.memory))


def _parser() -> Parser:
    parser = Parser(
        prog="rewurst plan",
        description=DESCRIPTION,
        epilog="Other options are those of `rewurst fit`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--devices", type=int, nargs="+", metavar="N", help="in all; by default the config's")
    parser.add_argument("--memory", metavar="80GiB", help="of a device; by default this machine's, or 80GiB of a GPU")
    parser.add_argument("--image_size", type=int, metavar="512", help="of the images that latents were made of")
    return parser


class Configured:
    """A config as far as memory goes.

    Args:
        config: As ``fit`` parses it.
        image_size: Where the data do not say.
        memory: Of a device, in bytes; by default this machine's.

    Raises:
        UsageError: A module, precision or strategy that is not known here.
    """

    def __init__(self, config: Config, image_size: int | None = None, memory: int | None = None) -> None:
        trainer = config["trainer"]
        if not config.get("data"):
            raise UsageError("the config has no data, whose micro-batch memory depends on")
        self.model, self.data, self.trainer, self.image_size = config["model"], config["data"], trainer, image_size
        precision = str(trainer.get("precision"))
        if precision not in PRECISIONS:
            raise UsageError(f"plan knows precision {', '.join(PRECISIONS)}, not {precision}")
        self.mixed, self.on_cpu = PRECISIONS[precision], trainer.get("accelerator") == "cpu"
        self.memory = memory or _own_memory(self.on_cpu)
        self.micro_batch_size = int(self.data["init_args"]["micro_batch_size"])
        self.global_batch_size = int(self.data["init_args"]["global_batch_size"])
        devices, nodes = trainer.get("devices"), int(trainer.get("num_nodes") or 1)
        per_node = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
        self.devices = max(1, per_node) * nodes
        named = trainer.get("strategy") or "auto"
        self.strategy = named if isinstance(named, str) else named["class_path"]
        self.options: Mapping[str, Any] = {} if isinstance(named, str) else named.get("init_args") or {}
        own = self.model["init_args"].get("activation_checkpointing")
        self.recomputed: int | None = own or self.options.get("activation_checkpointing")
        self.simulated: Callable[[int, int | None, bool], StepBytes] = cache(self._simulated)
        self._facts()

    def _facts(self) -> None:
        """Weights, states and what lies beside them."""
        with without_memory():
            built = self._built(None)
            states: dict[Any, int] = {}
            for optimizer in built.optimizers:
                states |= state_bytes(optimizer)
            self.weights = _weights(built.module, states)
            self.beside = dict(built.beside)
            buffers = sum(buffer.nbytes for buffer in built.module.buffers())
            self.frozen = sum(self.beside.values()) + buffers
            self.logits, self.logits_stay = built.logits, built.logits_stay
            enough = (rows for rows in range(1, 2**20) if built.logits(rows + 1) == built.logits(rows))
            self.straight_from = 2 if built.logits_stay else next(enough)
            self.sample, self.notes = built.sample, built.notes
            # bitsandbytes' kernel on the CPU decodes states of a whole tensor at a time; see _step_8_bits.
            largest = [p.numel() for o in built.optimizers for p in states if _in_8_bits(o, p)] if self.on_cpu else []
            self.workspace = 20 * max(largest, default=0)

    def _built(self, every: int | None) -> Planned:
        model = {**self.model, "init_args": {**self.model["init_args"]}}
        built = planned(model, self.data, self.mixed, self.image_size)
        if every is not None:
            recompute(find_blocks(built.module)[::-1], every)
        return built

    def _simulated(self, micro_batch_size: int, every: int | None, narrow: bool) -> StepBytes:
        with without_memory() as live:
            built = self._built(every)
            if narrow:
                _narrow(built.module)
            return simulate(live, built.module, lambda: built.loss(micro_batch_size), self.mixed)

    def step_bytes(self, micro_batch_size: int, every: int | None, narrow: bool) -> StepBytes:
        """Of the config's micro-batch as it is, of others in proportion to that and the double of it."""
        first = max(self.micro_batch_size, self.straight_from)
        if micro_batch_size == first or micro_batch_size < self.straight_from:
            return self.simulated(micro_batch_size, every, narrow)
        return extrapolate({rows: self.simulated(rows, every, narrow) for rows in (first, 2 * first)}, micro_batch_size)

    def layout(self, devices: int) -> Layout:
        """Of the config's strategy over so many devices."""
        sharded = "fsdp" in self.strategy.lower()
        replicas = self.options.get("replicas", 1) if sharded else 1
        if not isinstance(replicas, int):
            replicas = int(self.trainer.get("num_nodes") or 1)
        if devices % replicas:
            raise UsageError(f"replicas {replicas} do not divide {devices} devices")
        dtype = self.options.get("param_dtype") or ("bfloat16" if self.mixed else None)
        callbacks = [item["class_path"].rsplit(".", 1)[-1] for item in self.trainer.get("callbacks") or []]
        return Layout(
            devices=devices,
            strategy="fsdp" if sharded else "ddp" if devices > 1 else "single",
            replicas=replicas,
            gathered_itemsize=None if dtype is None else getattr(torch, dtype).itemsize,
            reduced_itemsize=getattr(torch, self.options.get("reduce_dtype") or "float32").itemsize,
            reshard=bool(self.options.get("reshard_after_forward", True)),
            offload=bool(self.options.get("cpu_offload", False)),
            accumulates=self.global_batch_size > self.micro_batch_size * devices,
            averaged="WeightAverage" in callbacks,
            bucket_views=bool(self.options.get("gradient_as_bucket_view", False)),
        )

    def at(self, layout: Layout, micro_batch_size: int, every: int | None) -> MemoryPlan:
        """Memory of a device."""
        accumulates = self.global_batch_size > micro_batch_size * layout.devices
        narrow = layout.strategy == "fsdp" and layout.gathered_itemsize == 2
        return plan(
            self.weights,
            self.step_bytes(micro_batch_size, every, narrow),
            replace(layout, accumulates=accumulates),
            self.frozen,
            self.logits(micro_batch_size),
            self.logits_stay,
            self.workspace // layout.shards,
        )

    def answers(self, devices: int) -> list[Answer]:
        """Without and with blocks recomputed."""
        layout, found = self.layout(devices), []
        for every in (None, self.recomputed or 1):
            limit = self.memory * (1 - RESERVE)
            largest = largest_micro_batch(lambda rows, every=every: self.at(layout, rows, every).total, limit)  # type: ignore[misc]
            divisors = [n for n in range(1, largest + 1) if self.global_batch_size % (n * devices) == 0]
            at = self.at(layout, self.micro_batch_size, every)
            found.append(Answer(layout, every, at, largest, max(divisors, default=0)))
        return found

    def describe(self) -> list[str]:
        """What is planned, and what had to be assumed."""
        trained = sum(weight.elements for weight in self.weights if weight.trained)
        every = sum(weight.elements for weight in self.weights)
        name = self.model["class_path"].rsplit(".", 1)[-1]
        of = "" if trained == every else f" ({trained / 1e6:,.1f}M trained)"
        optimizer = self.model["init_args"].get("optimizer") or "adamw"
        optimizer = optimizer if isinstance(optimizer, str) else optimizer["class_path"].rsplit(".", 1)[-1]
        precision = "bf16-mixed" if self.mixed else "fp32"
        batch = f"{self.micro_batch_size} {self.sample} a device, {self.global_batch_size} in all"
        first = f"{name}, {every / 1e6:,.1f}M parameters{of}, {optimizer}, {precision}; {batch}"
        return [first, *(f"note: {note}" for note in [*self.notes, *([GLIBC] if self.on_cpu else [])])]


def table(answers: list[Answer], memory: int) -> str:
    """Lines of text for one number of devices."""
    layout = answers[0].layout
    kind = {"single": "no strategy", "ddp": "DDP", "fsdp": f"FSDP over {layout.shards}"}[layout.strategy]
    names = ["as it is" if a.recomputed is None else _recomputed(a.recomputed) for a in answers]
    rows = [[f"{layout.devices} device{'s' * (layout.devices > 1)}, {kind}, GB", *names]]
    parts = {
        "parameters": "parameters",
        "gradients": "gradients",
        "optimizer states": "states",
        "averages and frozen networks": "copies",
        "gathered and reduced": "buffers",
        "logits, or a chunk of them": "logits",
        "activations and temporary tensors": "activations",
        "at the peak": "total",
    }
    rows += [[text, *(f"{getattr(a.plan, part) / 1e9:.2f}" for a in answers)] for text, part in parts.items()]
    rows.append(["which is in", *(a.plan.peak_in for a in answers)])
    fits = ["yes" if a.plan.fits(memory) else "no" for a in answers]
    rows.append([f"fits {memory / 2**30:.3g} GiB with {RESERVE:.0%} left", *fits])
    rows.append(["largest micro-batch that does", *(str(a.largest) for a in answers)])
    rows.append(["of those that divide the global batch", *(str(a.dividing) for a in answers)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _recomputed(every: int) -> str:
    return "blocks recomputed" if every == 1 else f"every {every}th block recomputed"


def _weights(module: nn.Module, states: Mapping[Any, int]) -> list[Weight]:
    try:
        blocks = find_blocks(module)
    except UsageError:
        blocks = []
    number = {parameter: index for index, block in enumerate(blocks[::-1]) for parameter in block.parameters()}
    whole = {parameter for child in frozen_children(module) for parameter in child.parameters()}
    return [
        Weight(
            tuple(parameter.shape),
            parameter.element_size(),
            parameter.requires_grad,
            states.get(parameter, 0),
            number.get(parameter),
            parameter in whole,
        )
        for parameter in module.parameters()
    ]


def _narrow(module: nn.Module) -> None:
    """Parameters in bfloat16, as they are gathered; ``Module.to`` cannot exchange those without memory."""
    narrowed: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old.is_floating_point():
                if old not in narrowed:
                    narrowed[old] = nn.Parameter(old.detach().to(torch.bfloat16), old.requires_grad)
                part._parameters[name] = narrowed[old]


def _in_8_bits(optimizer: Any, parameter: Any) -> bool:
    return isinstance(optimizer, EightBitOptimizer) and optimizer.in_8_bits(parameter)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise UsageError(f"--memory {text} is no size: give one such as 80GiB, 24GB or 16384MiB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def _own_memory(on_cpu: bool) -> int:
    if not on_cpu and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if on_cpu else 80 * 2**30
