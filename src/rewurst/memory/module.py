"""Build a config's module and data module, and measure one training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pydoc import locate
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from .. import UsageError
from ..callbacks.fsdp.blocks import find_blocks, frozen_children, recompute
from ..cli.lightning import instantiate
from ..datamodules.corpora.latents import MAKERS
from ..datamodules.images import ImageTextDataModule
from ..datamodules.latents import LatentDataModule
from ..modules.optimizers.eight_bit import EightBitOptimizer
from ..modules.shared.text_diffusion import TextStage
from .arithmetic import StepBytes, Weight
from .counting import optimizer_bytes, without_memory
from .simulation import measure_step
from .stand_ins import rows_of_one_sequence, stand_ins

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """Measurements of a module and one training step.

    Attributes:
        weights: Parameters of the module.
        step: Bytes that the step holds.
        workspace: Bytes that the optimizers' steps hold temporarily.
        optimizers: Class names of the optimizers.
        batch: Names and shapes of the batch's tensors.
        notes: Assumptions that were made.
    """

    weights: list[Weight]
    step: StepBytes
    workspace: int
    optimizers: list[str]
    batch: str
    notes: list[str]


def measure(
    config: Config,
    micro_batch_size: int,
    precision: str,
    on_cpu: bool,
    every: int | None = None,
    narrow: bool = False,
    image_size: int | None = None,
) -> Measured:
    """Measure one training step of a config's module.

    Args:
        config: Config with ``model`` and ``data``.
        micro_batch_size: Number of samples in the batch.
        precision: Precision of the Trainer.
        on_cpu: Whether training is on a CPU, where 8-bit states are decoded one tensor at a time.
        every: Number n to recompute every n-th block.
        narrow: Whether parameters are in bfloat16, as FSDP gathers them under mixed precision.
        image_size: Side in pixels of the images that latents are made from, if the config does not say.

    Raises:
        UsageError: The data module does not describe a batch, or the step cannot run on fake tensors.
    """
    notes: list[str] = []
    data = instantiate(LightningDataModule, config["data"])
    batch, unprepared = _example_batch(data, micro_batch_size, image_size)
    with without_memory() as live:
        module = _build(config["model"], notes)
        if every is not None:
            recompute(find_blocks(module)[::-1], every)
        if narrow:
            _narrow(module)
        if unprepared:
            batch = _prepared(module, batch)
            notes.append("latents are assumed to be prepared" + " with text states" * ("text" in batch))
        with rows_of_one_sequence():
            step, optimizers = measure_step(live, module, data, batch, precision)
        states: dict[Any, int] = {}
        workspace = 0
        for optimizer in optimizers:
            of_optimizer, held = optimizer_bytes(optimizer, live)
            states |= of_optimizer
            workspace = max(workspace, held, _decoded(optimizer, states) if on_cpu else 0)
        names = [type(optimizer).__name__ for optimizer in optimizers]
        return Measured(_weights(module, states), step, workspace, names, _shapes(batch), notes)


def _build(settings: Config, notes: list[str]) -> LightningModule:
    """Build a module of fake tensors, replacing arguments that would read weights or values."""
    arguments = dict(settings.get("init_args") or {})
    replaced = getattr(locate(settings["class_path"]), "planning_arguments", {})
    with stand_ins(arguments, notes):
        module: LightningModule = instantiate(
            LightningModule, {"class_path": settings["class_path"], "init_args": {**arguments, **replaced}}
        )
    return module


def _example_batch(data: LightningDataModule, micro_batch_size: int, image_size: int | None) -> tuple[Any, bool]:
    """Return a training batch, and whether it has images because latents are not prepared yet."""
    if isinstance(data, LatentDataModule):
        if image_size is None:
            try:
                return data.example_batch(micro_batch_size), False
            except UsageError as error:
                raise UsageError(
                    f"{error}; until then the image size is unknown: give --image_size, such as 512"
                ) from error
        data.sizes = [(image_size, image_size)]
        return ImageTextDataModule.example_batch(data, micro_batch_size), True
    if isinstance(data, ImageTextDataModule) and image_size is not None:
        data.sizes = [(image_size, image_size)]
    describe = getattr(data, "example_batch", None)
    if describe is None:
        raise UsageError(
            f"{type(data).__name__} does not describe a batch: add a method example_batch(micro_batch_size) that "
            "returns a batch for training_step, with tensors of any values"
        )
    return describe(micro_batch_size), False


def _prepared(module: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch that :class:`LatentDataModule` will yield once latents of these images are prepared."""
    if not isinstance(module, TextStage):
        raise UsageError(f"{type(module).__name__} does not say which latents it needs: prepare them first, then plan")
    rest = {name: part for name, part in batch.items() if name != "image"}
    with torch.no_grad():
        latents = module.data_of(batch)
        made = {"z": latents, "a": latents, "text": module.encode(batch["caption"]).half()}
    makers = module.frozen_parts()
    return rest | {name: tensor for name, tensor in made.items() if makers.get(MAKERS[name]) is not None}


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
    """Convert parameters to bfloat16; ``Module.to`` cannot replace fake ones."""
    narrowed: dict[nn.Parameter, nn.Parameter] = {}  # keeps tied parameters tied
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old.is_floating_point():
                if old not in narrowed:
                    narrowed[old] = nn.Parameter(old.detach().to(torch.bfloat16), old.requires_grad)
                part._parameters[name] = narrowed[old]


def _decoded(optimizer: Any, states: Mapping[Any, int]) -> int:
    """Return the bytes that bitsandbytes' CPU kernel decodes for the largest tensor: 20 per element."""
    if not isinstance(optimizer, EightBitOptimizer):
        return 0
    return 20 * max((parameter.numel() for parameter in states if optimizer.in_8_bits(parameter)), default=0)


def _shapes(batch: Any) -> str:
    """Return the shapes of a batch's tensors as text."""
    if isinstance(batch, Mapping):
        named = [(f"{name} ", part) for name, part in batch.items()]
    else:
        named = [("", part) for part in (batch if isinstance(batch, list | tuple) else [batch])]
    shapes = [(name, "x".join(map(str, part.shape))) for name, part in named if isinstance(part, Tensor)]
    return ", ".join(name + shape for name, shape in shapes)
