"""Plan before training whether a config fits a device's memory."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from .. import UsageError
from ..cli.lightning import instantiate, parse
from ..cli.parser import Parser
from .arithmetic import RESERVE, Layout, MemoryPlan, StepBytes, extrapolate, largest_micro_batch, plan
from .module import Measured, measure

Config = Mapping[str, Any]
DESCRIPTION = "Show how much device memory a config needs, whether it fits, and the largest micro-batch that does."
UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
GLIBC = "fragmentation in glibc may more than double this; set MALLOC_MMAP_THRESHOLD_=1048576 to avoid it"
PRECISIONS = {"32-true": "32-true", "32": "32-true", "None": "32-true", "bf16-mixed": "bf16-mixed"}
PRECISIONS["16-mixed"] = "bf16-mixed"  # as many bytes, and a CPU can run it
ROWS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer states": "states",
    "averages and frozen networks": "copies",
    "gathered and reduced": "buffers",
    "activations and temporary tensors": "activations",
    "at the peak": "total",
}
"""Name in the table of each part of a plan."""


@dataclass(frozen=True)
class Answer:
    """Plan of one layout.

    Attributes:
        layout: Layout over devices.
        recomputed: Interval of recomputed blocks, 1 for all; None if no block is recomputed.
        plan: Plan at the config's micro-batch.
        largest_tensor: Bytes of the largest tensor that a step makes.
        largest: Largest micro-batch that fits.
        dividing: Largest micro-batch that fits and divides the global batch.
    """

    layout: Layout
    recomputed: int | None
    plan: MemoryPlan
    largest_tensor: int
    largest: int
    dividing: int


def run(args: list[str]) -> None:
    """Run ``plan --config FILE [--config MORE] ... [--devices N ...] [--memory 80GiB]``."""
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
    parser.add_argument(
        "--devices", type=int, nargs="+", metavar="N", help="Number of devices in total (default: the config's)"
    )
    parser.add_argument("--memory", metavar="80GiB", help="Memory per device (default: this machine's, or 80GiB)")
    parser.add_argument("--image_size", type=int, metavar="512", help="Side of the images that latents are made from")
    return parser


class Configured:
    """A config whose memory use can be planned.

    Args:
        config: Config as ``fit`` parses it.
        image_size: Side of the images in pixels, if the config does not say.
        memory: Bytes per device; by default this machine's.

    Raises:
        UsageError: The precision is unknown, or the step cannot be measured.
    """

    def __init__(self, config: Config, image_size: int | None = None, memory: int | None = None) -> None:
        trainer = config["trainer"]
        if not config.get("data"):
            raise UsageError("the config has no data section, but memory depends on its micro-batch: add one")
        precision = str(trainer.get("precision"))
        if precision not in PRECISIONS:
            raise UsageError(f"plan supports precision {', '.join(PRECISIONS)}, not {precision}")
        self.config, self.trainer, self.image_size = config, trainer, image_size
        self.precision, self.on_cpu = PRECISIONS[precision], trainer.get("accelerator") == "cpu"
        self.memory = memory or _own_memory(self.on_cpu)
        devices, nodes = trainer.get("devices"), int(trainer.get("num_nodes") or 1)
        per_node = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
        self.devices = max(1, per_node) * nodes
        named = trainer.get("strategy") or "auto"
        self.strategy = named if isinstance(named, str) else named["class_path"]
        self.options: Mapping[str, Any] = {} if isinstance(named, str) else named.get("init_args") or {}
        self.micro_batch_size, self.global_batch_size = self._batch_sizes()
        own = config["model"].get("init_args", {}).get("activation_checkpointing")
        self.recomputed: int | None = own or self.options.get("activation_checkpointing")
        self.measured: Callable[[int, int | None, bool], Measured] = cache(self._measured)

    @property
    def mixed(self) -> bool:
        """Whether matrix products are in bfloat16."""
        return self.precision == "bf16-mixed"

    @property
    def facts(self) -> Measured:
        """Measurement at the config's micro-batch with unchanged parameters."""
        return self.measured(self.micro_batch_size, None, False)

    def _batch_sizes(self) -> tuple[int, int]:
        """Return the micro-batch size and the global batch size."""
        data = instantiate(LightningDataModule, self.config["data"])
        micro = getattr(data, "micro_batch_size", None) or getattr(data, "batch_size", None)
        if not isinstance(micro, int):
            raise UsageError(f"{type(data).__name__} has neither micro_batch_size nor batch_size: add one of them")
        accumulated = int(self.trainer.get("accumulate_grad_batches") or 1)
        return micro, int(getattr(data, "global_batch_size", micro * self.devices * accumulated))

    def _measured(self, micro_batch_size: int, every: int | None, narrow: bool) -> Measured:
        sizes = {"every": every, "narrow": narrow, "image_size": self.image_size}
        return measure(self.config, micro_batch_size, self.precision, self.on_cpu, **sizes)  # type: ignore[arg-type]

    def step_bytes(self, micro_batch_size: int, every: int | None, narrow: bool) -> StepBytes:
        """Return the step's bytes at a micro-batch, extrapolated from the config's and its double if it is another."""
        first = self.micro_batch_size
        if micro_batch_size == first:
            return self.measured(first, every, narrow).step
        known = {rows: self.measured(rows, every, narrow).step for rows in (first, 2 * first)}
        return extrapolate(known, micro_batch_size)

    def layout(self, devices: int) -> Layout:
        """Return the layout of the config's strategy over a number of devices."""
        sharded = "fsdp" in self.strategy.lower()
        replicas = self.options.get("replicas", 1) if sharded else 1
        if not isinstance(replicas, int):
            replicas = int(self.trainer.get("num_nodes") or 1)
        if devices % replicas:
            raise UsageError(f"replicas is {replicas}, which does not divide {devices} devices")
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
            averaged="WeightAverage" in callbacks,
            bucket_views=bool(self.options.get("gradient_as_bucket_view", False)),
        )

    def at(self, layout: Layout, micro_batch_size: int, every: int | None) -> MemoryPlan:
        """Return the plan of a device."""
        accumulates = self.global_batch_size > micro_batch_size * layout.devices
        step = self.step_bytes(micro_batch_size, every, self._narrow(layout))
        workspace = self.facts.workspace // layout.shards
        return plan(self.facts.weights, step, replace(layout, accumulates=accumulates), workspace)

    def answers(self, devices: int) -> list[Answer]:
        """Return the answers without and, if the module has blocks, with recomputed blocks."""
        layout, found = self.layout(devices), []
        has_blocks = any(weight.block is not None for weight in self.facts.weights)
        for every in (None, self.recomputed or 1) if has_blocks else (None,):
            limit = self.memory * (1 - RESERVE)
            largest = largest_micro_batch(lambda rows, every=every: self.at(layout, rows, every).total, limit)  # type: ignore[misc]
            divisors = [n for n in range(1, largest + 1) if self.global_batch_size % (n * devices) == 0]
            at = self.at(layout, self.micro_batch_size, every)
            tensor = self.step_bytes(self.micro_batch_size, every, self._narrow(layout)).largest
            found.append(Answer(layout, every, at, tensor, largest, max(divisors, default=0)))
        return found

    def describe(self) -> list[str]:
        """Return lines that describe what is planned and which assumptions were made."""
        facts, model = self.facts, self.config["model"]
        trained = sum(weight.elements for weight in facts.weights if weight.trained)
        every = sum(weight.elements for weight in facts.weights)
        of = "" if trained == every else f" ({trained / 1e6:,.1f}M trained)"
        chosen = model.get("init_args", {}).get("optimizer")
        optimizer = chosen if isinstance(chosen, str) else ", ".join(facts.optimizers)
        precision = "bf16-mixed" if self.mixed else "fp32"
        name = model["class_path"].rsplit(".", 1)[-1]
        batch = f"{self.micro_batch_size} samples per device ({facts.batch}), {self.global_batch_size} in total"
        first = f"{name}, {every / 1e6:,.1f}M parameters{of}, {optimizer}, {precision}; {batch}"
        return [first, *(f"note: {note}" for note in [*facts.notes, *([GLIBC] if self.on_cpu else [])])]

    @staticmethod
    def _narrow(layout: Layout) -> bool:
        return layout.strategy == "fsdp" and layout.gathered_itemsize == 2


def table(answers: list[Answer], memory: int) -> str:
    """Return the table for one number of devices as text."""
    layout = answers[0].layout
    kind = {"single": "no strategy", "ddp": "DDP", "fsdp": f"FSDP over {layout.shards}"}[layout.strategy]
    names = ["as it is" if a.recomputed is None else _recomputed(a.recomputed) for a in answers]
    rows = [[f"{layout.devices} device{'s' * (layout.devices > 1)}, {kind}, GB", *names]]
    rows += [[text, *(f"{getattr(a.plan, part) / 1e9:.2f}" for a in answers)] for text, part in ROWS.items()]
    rows.append(["which is in", *(a.plan.peak_in for a in answers)])
    rows.append(["largest tensor of a step", *(f"{a.largest_tensor / 1e9:.2f}" for a in answers)])
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


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise UsageError(f"--memory {text} is not a size: use one such as 80GiB, 24GB or 16384MiB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def _own_memory(on_cpu: bool) -> int:
    if not on_cpu and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if on_cpu else 80 * 2**30
