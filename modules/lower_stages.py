"""Stage B and Stage A as Stage C uses them: frozen, to see what its embeddings look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from .. import UsageError
from . import diffusion
from .networks import VQGAN, ConditionCache, SemanticCompressor, StageBUNet, TextEncoder
from .stage_parts import Frozen, holds
from .weights import read_file


class LowerStages:
    """From embeddings to pictures.

    Args:
        stage_b: Checkpoint with Stage B and its compressor.
        stage_a: Checkpoint or folder of Stage A; by default the one that Stage B's checkpoint names.
        pixels_per_latent: Of the compressor.

    Raises:
        UsageError: There is no Stage B or no Stage A, or the latter is not the one that B was trained with.
    """

    def __init__(self, stage_b: str, stage_a: str | None, pixels_per_latent: float) -> None:
        if not holds(stage_b, StageBUNet):
            raise UsageError(f"{stage_b} holds no StageBUNet, which pictures are drawn with: give Stage B's checkpoint")
        content = read_file(stage_b)
        kept = content.get("frozen", {}).get("stage_a")
        source = stage_a or (kept or {}).get("source")
        if source is None:
            raise UsageError(f"{stage_b} names no Stage A, which pictures are drawn with: give stage_a")
        self.stage_a = Frozen(VQGAN.from_checkpoint(source, torch.float32), source)
        self.stage_a.check(kept, "stage_a")
        self.unet = Frozen(StageBUNet.from_checkpoint(stage_b, torch.float32), stage_b)
        named = content.get("text_encoder")
        self.text_encoder = Frozen(TextEncoder.from_pretrained(named), named) if isinstance(named, str) else None
        self._text_length = int(content.get("text_length", 77))
        self._scale = pixels_per_latent / self.stage_a.module.compression

    @torch.no_grad()
    def draw(self, z: Tensor, captions: Sequence[str], randomness: list[Generator] | None, steps: int) -> Tensor:
        """Draw pictures (n, 3, height, width) in [0, 1] from embeddings (n, c, h, w) in the compressor's scale."""
        unet, vqgan = self.unet.on(z.device), self.stage_a.on(z.device)
        text = self._text(captions, z.device)
        size = [int(side * self._scale) for side in z.shape[-2:]]
        x = diffusion.draw((len(z), unet.config["c_in"], *size), randomness, z)
        cache: ConditionCache = {}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            noise: Tensor = unet(x, t, z, text, cache)
            return noise.float()

        return vqgan.to_images(diffusion.sample(predict, x, diffusion.timesteps(steps), randomness)).float()

    def _text(self, captions: Sequence[str], device: torch.device) -> Tensor:
        if self.text_encoder is not None:
            return self.text_encoder.on(device).encode(captions)
        return torch.zeros(len(captions), self._text_length, self.unet.module.config["clip_embd"], device=device)


def own_scale(compressor: SemanticCompressor) -> tuple[float, float]:
    """Return ``latent_mean`` and ``latent_std`` that bring a compressor's z to mean 0 and deviation 1.

    Its last layer is a BatchNorm, whose output has the mean ``bias`` and the deviation ``weight`` in every channel: no
    image has to be looked at, and every process finds the same numbers.
    """
    norm: Any = compressor.mapper[1]
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    mean = bias.mean()
    deviation = (weight.square() + (bias - mean).square()).mean().sqrt()
    return round(float(deviation), 4), round(-float(mean), 4)
