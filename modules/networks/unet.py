"""Stage B: a U-Net that turns Semantic Compressor latents into Stage A latents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ... import UsageError
from . import diffusion
from .base import Network, Presets
from .conditioned import ConditionedResBlock
from .layers import (
    AttnBlock,
    ConditionCache,
    Conv,
    ConvTranspose,
    Pointwise,
    Shuffle,
    TimestepBlock,
    Unshuffle,
    check_size,
    layer_norm,
    timestep_embedding,
    xavier,
)


@dataclass(frozen=True)
class Conditions:
    """Conditions that all blocks of a forward pass share.

    Attributes:
        embedding: Embedding of the timestep, (batch, c_r).
        text: Mapped text states, (batch, n, c_cond).
        effnet: The compressor's latents, (batch, 16, h, w), or None if no level sees them.
        cache: Cache of the sampling run.
    """

    embedding: Tensor
    text: Tensor
    effnet: Tensor | None
    cache: ConditionCache

    def latents(self, h: int, w: int) -> Float[Tensor, "batch h w c_latent"]:
        """Resize the compressor's latents, once per size and sampling run."""
        key = f"latents.{h}x{w}"
        if key not in self.cache:
            if self.effnet is None:
                raise ValueError("effnet is None, but a level needs the compressor's latents (inject_effnet)")
            resized = F.interpolate(
                self.effnet.float(), size=(h, w), mode="bicubic", antialias=True, align_corners=True
            )
            self.cache[key] = (resized.to(self.text.dtype).permute(0, 2, 3, 1).contiguous(),)
        return self.cache[key][0]


class StageBUNet(Network):
    """Würstchen's Stage B (arXiv 2306.00637): U-Net with the compressor's latents injected at most levels.

    Args:
        c_in: Channels of the noised latents.
        c_out: Channels of the predicted noise.
        c_r: Width of the timestep embedding.
        patch_size: Side length in latent pixels of the patch that makes a pixel of the first level.
        c_cond: Width of mapped text states and conditions.
        c_hidden: Width of each level.
        nhead: Number of attention heads of each level; -1 for a level without attention.
        blocks: Number of times each level repeats its ``level_config``.
        level_config: Blocks of each level, as a word of C (residual), T (timestep) and A (attention).
        inject_effnet: Whether each level sees the compressor's latents.
        effnet_embd: Channels of the compressor's latents.
        clip_embd: Width of the text states.
        kernel_size: Kernel size of the depthwise convolutions.
        dropout: Dropout rate in MLPs and after attention; one for all levels or one per level.
    """

    diffusers_class = "WuerstchenDiffNeXt"
    _no_split_modules: ClassVar[list[str]] = ["ConditionedResBlock", "AttnBlock"]
    presets: ClassVar[Presets] = {
        "tiny": {
            "c_cond": 32,
            "c_hidden": [32, 64],
            "nhead": [-1, 4],
            "blocks": [1, 1],
            "level_config": ["CT", "CTA"],
            "inject_effnet": [False, True],
            "clip_embd": 32,
            "dropout": 0.0,
        },
        "small": {"c_cond": 512, "c_hidden": [160, 320, 640, 640], "nhead": [-1, 5, 10, 10], "clip_embd": 768},
        "paper": {},
        "released": {},
    }

    def __init__(
        self,
        c_in: int = 4,
        c_out: int = 4,
        c_r: int = 64,
        patch_size: int = 2,
        c_cond: int = 1024,
        c_hidden: Sequence[int] = (320, 640, 1280, 1280),
        nhead: Sequence[int] = (-1, 10, 20, 20),
        blocks: Sequence[int] = (4, 4, 14, 4),
        level_config: Sequence[str] = ("CT", "CTA", "CTA", "CTA"),
        inject_effnet: Sequence[bool] = (False, True, True, True),
        effnet_embd: int = 16,
        clip_embd: int = 1024,
        kernel_size: int = 3,
        dropout: float | Sequence[float] = 0.1,
    ) -> None:
        arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__(**arguments)
        _check_levels(self.config, len(c_hidden))
        self.c_r, self.patch_size = c_r, patch_size
        self.clip_mapper = nn.Linear(clip_embd, c_cond)
        self.effnet_mappers = nn.ModuleList()
        for index, inject in enumerate([*inject_effnet, *reversed(inject_effnet)]):
            self.effnet_mappers.add_module(str(index), nn.Conv2d(effnet_embd, c_cond, 1) if inject else None)
        self.seq_norm = layer_norm(c_cond)
        self.embedding = nn.Sequential(
            Unshuffle(patch_size), Pointwise(c_in * patch_size**2, c_hidden[0]), layer_norm(c_hidden[0])
        )
        levels = range(len(c_hidden))
        self.down_blocks = nn.ModuleList(nn.ModuleList([*_down(c_hidden, i), *_blocks(self.config, i)]) for i in levels)
        self.up_blocks = nn.ModuleList(
            nn.ModuleList([*_blocks(self.config, i, c_skip=c_hidden[i] if i < levels[-1] else 0), *_up(c_hidden, i)])
            for i in reversed(levels)
        )
        self.clf = nn.Sequential(
            layer_norm(c_hidden[0]), Pointwise(c_hidden[0], 2 * c_out * patch_size**2), Shuffle(patch_size)
        )
        self.reset_parameters()

    @property
    def multiple(self) -> int:
        """Number of which the latents' height and width must be multiples."""
        return int(self.patch_size * 2 ** (len(self.down_blocks) - 1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize as the authors do; each residual block is scaled once, by 1 / sqrt(number of blocks)."""
        self.apply(xavier)
        for mapper in [*self.effnet_mappers, self.clip_mapper]:
            if mapper is not None:
                nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.get_parameter("embedding.1.weight"), gain=0.02)
        nn.init.zeros_(self.get_parameter("clf.1.weight"))
        for module in self.modules():
            if isinstance(module, ConditionedResBlock):
                module.get_parameter("channelwise.4.weight").mul_(math.sqrt(1 / sum(self.config["blocks"])))
            elif isinstance(module, TimestepBlock):
                nn.init.zeros_(module.mapper.weight)

    def guided(
        self,
        x: Tensor,
        t: Tensor,
        effnet: Tensor,
        text: Tensor,
        cache: ConditionCache,
        guidance_scale: float,
    ) -> Tensor:
        """Predict the noise in ``x`` at a step of a sampling run, with or without guidance.

        Args:
            x: Noised latents, (n, c_in, h, w).
            t: Timesteps, (n,).
            effnet: The compressor's latents, (n, 16, h, w).
            text: Text states, (n, length, width); with guidance (2 n, length, width), the negative ones last.
            cache: The same dict for all steps of the run.
            guidance_scale: Scale of the guidance away from the zero embedding and the negative text; off up to 1.
        """
        if guidance_scale <= 1:
            noise: Tensor = self(x, t, effnet, text, cache)
            return noise
        both = torch.cat([effnet, torch.zeros_like(effnet)])
        return diffusion.guide(self(torch.cat([x, x]), t.repeat(2), both, text, cache), guidance_scale)

    def forward(
        self,
        x: Float[Tensor, "batch c_in h w"],
        t: Float[Tensor, " batch"],
        effnet: Float[Tensor, "batch c_latent h_latent w_latent"] | None,
        text: Float[Tensor, "batch n c_text"],
        cache: ConditionCache | None = None,
    ) -> Float[Tensor, "batch c_out h w"]:
        """Predict the noise in ``x``.

        Args:
            x: Noised Stage A latents divided by 0.3764; height and width are multiples of ``multiple``.
            t: Timesteps in [0, 1].
            effnet: The compressor's latents, not normalized, or None if no level sees them.
            text: Text states, including padding.
            cache: One dict for all steps of a sampling run, so that values that depend only on ``effnet`` and
                ``text`` are computed at the first step only.

        Returns:
            The noise, eps = (x - a) / b, in the dtype of ``x``.
        """
        check_size("latents", x, self.multiple)
        dtype = self.clip_mapper.weight.dtype
        cache = {} if cache is None else cache
        if "text" not in cache:
            cache["text"] = (self.seq_norm(self.clip_mapper(text.to(dtype))),)
        seen = Conditions(timestep_embedding(t, self.c_r, dtype), cache["text"][0], effnet, cache)
        y: Tensor = self.embedding(x.to(dtype))
        outputs: list[Tensor] = []
        levels = len(self.down_blocks)
        for i in range(levels):
            y = self._level(y, f"down_blocks.{i}", self.effnet_mappers[i], seen)
            outputs.append(y)
        skips = [None, *reversed(outputs[:-1])]
        for i in range(levels):
            y = self._level(y, f"up_blocks.{i}", self.effnet_mappers[levels + i], seen, skips[i])
        a, b = self.clf(y).to(x.dtype).chunk(2, dim=1)
        return diffusion.noise_from_unet(x, a, b).contiguous()

    def _level(
        self, y: Tensor, name: str, mapper: nn.Module | None, seen: Conditions, skip: Tensor | None = None
    ) -> Tensor:
        """Run a level's blocks; the first, a residual block, takes the skip connection."""
        blocks = self.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        weights = None if mapper is None else (mapper.weight, mapper.bias)
        for index, block in enumerate(blocks):
            key = f"{name}.{index}"
            kept = seen.cache.get(key)
            if isinstance(block, ConditionedResBlock):
                latents = None if mapper is None else seen.latents(y.shape[1], y.shape[2])
                y, seen.cache[key] = block(y, skip if index == 0 else None, latents, weights, kept)
            elif isinstance(block, AttnBlock):
                y, seen.cache[key] = block(y, seen.text, kept)
            else:
                y = block(y, seen.embedding) if isinstance(block, TimestepBlock) else block(y)
        return y


def _blocks(config: dict[str, Any], i: int, c_skip: int = 0) -> list[nn.Module]:
    """Build level i's blocks; the first takes ``c_skip`` additional channels."""
    c, c_cond, dropout = config["c_hidden"][i], config["c_cond"], config["dropout"]
    dropout = dropout[i] if isinstance(dropout, list) else dropout
    built: list[nn.Module] = []
    for kind in config["level_config"][i] * config["blocks"][i]:
        if kind == "C":
            condition = c_cond if config["inject_effnet"][i] else 0
            skip = 0 if built else c_skip
            built.append(ConditionedResBlock(c, skip, condition, config["kernel_size"], dropout))
        elif kind == "T":
            built.append(TimestepBlock(c, config["c_r"]))
        else:
            built.append(AttnBlock(c, c_cond, config["nhead"][i], dropout))
    return built


def _down(c_hidden: Sequence[int], i: int) -> list[nn.Module]:
    """Build the downsampling into level i; the first level has none."""
    if i == 0:
        return []
    return [nn.Sequential(layer_norm(c_hidden[i - 1]), Conv(c_hidden[i - 1], c_hidden[i], kernel_size=2, stride=2))]


def _up(c_hidden: Sequence[int], i: int) -> list[nn.Module]:
    """Build the upsampling out of level i; the first level has none."""
    if i == 0:
        return []
    out = ConvTranspose(c_hidden[i], c_hidden[i - 1], kernel_size=2, stride=2)
    return [nn.Sequential(layer_norm(c_hidden[i]), out)]


def _check_levels(config: dict[str, Any], levels: int) -> None:
    """Check that lists have an entry per level, and that words begin with C and consist of C, T and A."""
    for name in ("nhead", "blocks", "level_config", "inject_effnet"):
        if (count := len(config[name])) != levels:
            raise UsageError(f"{name} has {count} entries but c_hidden has {levels}: give one per level")
    if unknown := set("".join(config["level_config"])) - set("CTA"):
        raise UsageError(f"level_config has {min(unknown)!r}: use C, T and A")
    if wrong := [word for word in config["level_config"] if not word.startswith("C")]:
        raise UsageError(f"level_config has {wrong[0]!r}: begin each level with C, which takes the skip connection")
