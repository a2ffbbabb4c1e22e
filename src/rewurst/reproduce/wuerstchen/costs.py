"""Count the parameters of each stage and its FLOPs per step and per picture, here and as released, and A100-hours."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...modules import LatentDiffusion, StageB, StageC
from ...modules.networks import VQGAN, Network, PatchDiscriminator, Prior, SemanticCompressor, StageBUNet
from ...modules.networks.base import build
from ...modules.shared.flops import TRAINED, forward_flops, stage_a_flops, text_flops
from ...modules.shared.text_diffusion import TextStage
from .recipes import Recipes, image_size_of, shape_of

A100_HOURS = 24_602
A100_FLOPS = 312e12  # per second, dense bfloat16 products: NVIDIA's data sheet
MFU = 0.4
"""Share of these FLOPs that large runs reach (PaLM: 46 % on other devices)."""
PAPER_RUNS = ((12, 500_000, 1536), (24, 364_000, 1536), (24, 4_000, 768), (24, 50_000, 384))
"""Latents on a side, steps, batch of the released Stage C's four runs; from notes on the paper."""


@dataclass(frozen=True)
class Cost:
    """Cost of a stage.

    Args:
        parameters: Number of trained parameters.
        flops_per_step: Training FLOPs per global batch.
        flops_per_picture: FLOPs to draw a picture, with the recipe's steps and guidance.
    """

    parameters: int
    flops_per_step: float
    flops_per_picture: float


def costs_of(recipes: Recipes, tokenizer: str) -> dict[str, Cost]:
    """Return the costs by stage of modules with fresh weights; ``flops(batch)`` of the stages counts a step."""
    side = image_size_of(recipes)
    models = {stage: dict(recipe["model"]["init_args"]) for stage, recipe in recipes.items()}
    sizes = {stage: int(recipe["data"]["init_args"]["global_batch_size"]) for stage, recipe in recipes.items()}
    for model in models.values():
        if isinstance(model.get("text_encoder"), dict):
            model["text_encoder"] = model["text_encoder"] | {"tokenizer": tokenizer}
    with torch.random.fork_rng([]), tempfile.TemporaryDirectory() as folder:
        vqgan = build(VQGAN, models["stage_a"]["vqgan"])
        vqgan.save(Path(folder) / "a")
        b = StageB(**models["stage_b"] | {"stage_a": f"{folder}/a"})
        checkpoint: dict[str, Any] = {"state_dict": b.state_dict()}
        b.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, Path(folder) / "b.ckpt")
        c = StageC(**models["stage_c"] | {"stage_b": f"{folder}/b.ckpt"})
        single = LatentDiffusion(**models["single_stage"] | {"stage_a": f"{folder}/a"})
        latents = (vqgan.config["latent_channels"], side // vqgan.compression, side // vqgan.compression)
        z = shape_of(recipes["stage_b"], side)
        decode = forward_flops(vqgan, [(1, *latents)], "decode")
        discriminator = models["stage_a"].get("discriminator")
        adversary = None if discriminator is None else build(PatchDiscriminator, discriminator)
        images = (sizes["stage_a"], 3, side, side)
        unet = [(1, *latents), (1,), (1, *z), (1, _text_length(b), b.unet.config["clip_embd"])]
        return {
            "stage_a": Cost(_count(vqgan), stage_a_flops(vqgan, images, adversary), decode),
            "stage_b": Cost(
                _count(b),
                b.flops(_batch(sizes["stage_b"], image=(3, side, side))),
                b.sampling_steps * forward_flops(b.unet, unet),
            ),
            "stage_c": Cost(
                _count(c), c.flops(_batch(sizes["stage_c"], z=z)), _drawing(c, forward_flops(c.prior, _inputs(c, z)))
            ),
            "single_stage": Cost(
                _count(single),
                single.flops(_batch(sizes["single_stage"], a=latents)),
                _drawing(single, forward_flops(single.unet, [*_inputs(single, latents)[:2], None, _states(single)])),
            ),
        }


def _batch(samples: int, **shapes: tuple[int, ...]) -> dict[str, Any]:
    tensors = {name: torch.empty(samples, *shape, device="meta") for name, shape in shapes.items()}
    return {**tensors, "caption": [""] * samples}


def _inputs(module: TextStage, x: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(1, *x), (1,), _states(module)]


def _states(module: TextStage) -> tuple[int, int, int]:
    return 1, module.encoder.length, module.encoder.width


def _drawing(module: TextStage, forward: float) -> float:
    """Return the FLOPs of drawing a sample; guidance doubles the passes of every step."""
    passes = 2 if module.guidance_scale > 1 else 1
    return passes * (module.sampling_steps * forward + text_flops(module.encoder, 1))


def _text_length(module: StageB) -> int:
    return module.text_length if module.text_encoder is None else module.text_encoder.module.length


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def released() -> list[dict[str, Any]]:
    """Count parameters and FLOPs of the released networks on a picture of 1024 pixels; nothing is timed."""
    text_b, text_c = (1, 77, 1024), (1, 77, 1280)
    rows: list[dict[str, Any]] = []
    cases: list[tuple[str, type[Network], list[tuple[int, ...]], str, int]] = [
        ("Stage A, decoder", VQGAN, [(1, 4, 256, 256)], "decode", 1),
        ("Stage B", StageBUNet, [(1, 4, 256, 256), (1,), (1, 16, 24, 24), text_b], "__call__", 12),
        ("Stage C", Prior, [(1, 16, 24, 24), (1,), text_c], "__call__", 120),
        ("Semantic Compressor", SemanticCompressor, [(1, 3, 1024, 1024)], "__call__", 1),
    ]
    for name, network, shapes, method, passes in cases:
        with torch.device("meta"):
            empty = network.from_preset("released")
        forward = forward_flops(empty, list(shapes), method)
        row = {"network": name, "parameters": _count(empty), "flops_per_pass": forward}
        rows.append({**row, "passes_per_picture": passes, "flops_per_picture": passes * forward})
    return rows


def a100_hours() -> dict[str, Any]:
    """Return the FLOPs of 24,602 A100-hours: the maximum, at a stated utilization, and as counted from the runs."""
    with torch.device("meta"):
        prior = Prior.from_preset("released")
    runs = []
    for side, steps, batch in PAPER_RUNS:
        forward = forward_flops(prior, [(1, 16, side, side), (1,), (1, 77, 1280)])
        runs.append({"side": side, "steps": steps, "batch": batch, "flops": TRAINED * forward * steps * batch})
    counted = sum(run["flops"] for run in runs)
    most = A100_HOURS * 3600 * A100_FLOPS
    return {
        "hours": A100_HOURS,
        "flops_at_most": most,
        "mfu": MFU,
        "flops_at_mfu": MFU * most,
        "runs": runs,
        "flops_counted": counted,
        "mfu_counted": counted / most,
    }


def as_rows(costs: dict[str, Cost]) -> list[dict[str, Any]]:
    """Return the costs as rows of a report."""
    return [{"stage": stage, **asdict(cost)} for stage, cost in costs.items()]
