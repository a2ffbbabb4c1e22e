"""Stage C: the text-conditional prior over the Semantic Compressor's latents."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ... import UsageError
from . import diffusion
from .base import Network, Presets
from .layers import (
    AUTHORS_WIDTH,
    AttnBlock,
    ConditionCache,
    Pointwise,
    ResBlock,
    TimestepBlock,
    layer_norm,
    timestep_embedding,
    xavier,
)


class Prior(Network):
    """Würstchen's Stage C: residual, timestep and attention blocks in turn, at one resolution (arXiv 2306.00637).

    It scales the compressor's latents (``normalize``) by ``latent_mean`` and ``latent_std``, as diffusers calls them.
    These are attributes rather than arguments of the network, because they belong to the pipeline. Their defaults are
    the released compressor's.

    Args:
        c_in: Channels of the latents.
        c: Width of the blocks.
        c_cond: Width of the text states.
        c_r: Width of the timestep embedding.
        depth: Number of blocks of each kind.
        nhead: Number of attention heads; it must divide ``c``.
        dropout: Dropout rate in MLPs and after attention.
    """

    diffusers_class = "WuerstchenPrior"
    _no_split_modules: ClassVar[list[str]] = ["ResBlock", "AttnBlock"]
    presets: ClassVar[Presets] = {
        "tiny": {"c_in": 16, "c": 64, "c_cond": 32, "depth": 2, "nhead": 4, "dropout": 0.0},
        "small": {"c_in": 16, "c": 768, "c_cond": 768, "depth": 12, "nhead": 12},
        # 993,243,680 parameters: the paper's 1B (section 4, table 2) with CLIP-H. Section 3.2 says 16 blocks, which
        # contradicts that: at width 1280 they have 347,037,472.
        "paper": {"c_in": 16, "c": 1536, "c_cond": 1024, "depth": 32, "nhead": 24},
        "released": {"c_in": 16, "c": 1536, "c_cond": 1280, "depth": 32, "nhead": 24},
    }

    latent_mean: float = 42.0
    latent_std: float = 1.0

    def __init__(
        self,
        c_in: int = 16,
        c: int = 1280,
        c_cond: int = 1024,
        c_r: int = 64,
        depth: int = 16,
        nhead: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(c_in=c_in, c=c, c_cond=c_cond, c_r=c_r, depth=depth, nhead=nhead, dropout=dropout)
        self.c_r = c_r
        self.projection = Pointwise(c_in, c)
        self.cond_mapper = nn.Sequential(nn.Linear(c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.extend([ResBlock(c, dropout=dropout), TimestepBlock(c, c_r), AttnBlock(c, c, nhead, dropout)])
        self.out = nn.Sequential(layer_norm(c), Pointwise(c, c_in * 2))
        self.reset_parameters()

    def normalize(self, z: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Scale the compressor's latents for Stage C: (z + 1) / 42 for the released one."""
        return (z + self.latent_std) / self.latent_mean

    def denormalize(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Undo ``normalize``."""
        return x * self.latent_mean - self.latent_std

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize as the authors do: Xavier, small inputs, zero output and timestep, residuals scaled by depth.

        The authors' N(0, 0.02) preserves part of a text's scale at their widths. In narrow networks almost nothing
        would be left, and attention would ignore the text for hundreds of steps, so they preserve the scale. Also, only
        zero padding tells positions apart, and only if channels are not zero. Narrow networks have few blocks to
        spread this information, so their channels start with a constant.
        """
        self.apply(xavier)
        nn.init.normal_(self.projection.weight, std=0.02)
        if self.config["c"] < AUTHORS_WIDTH:
            nn.init.normal_(self.get_parameter("projection.bias"))
        for layer in ("cond_mapper.0", "cond_mapper.2"):
            weight = self.get_parameter(f"{layer}.weight")
            width = weight.shape[1]
            nn.init.normal_(weight, std=0.02 if width >= AUTHORS_WIDTH else math.sqrt(2 / width))
        nn.init.zeros_(self.get_parameter("out.1.weight"))
        for block in self.blocks:
            if isinstance(block, ResBlock):
                block.get_parameter("channelwise.4.weight").mul_(math.sqrt(1 / self.config["depth"]))
            elif isinstance(block, TimestepBlock):
                nn.init.zeros_(block.mapper.weight)

    def forward(
        self,
        x: Float[Tensor, "batch c_in h w"],
        t: Float[Tensor, " batch"],
        text: Float[Tensor, "texts n c_cond"],
        cache: ConditionCache | None = None,
    ) -> Float[Tensor, "texts c_in h w"]:
        """Predict the noise in ``x``.

        Args:
            x: Noised latents, in the scale of ``normalize``.
            t: Timesteps in [0, 1].
            text: Text states including padding: all 77 of CLIP. ``k`` times the batch size (guidance) gives the same
                result as repeating ``x`` and ``t`` ``k`` times, at less cost.
            cache: One dict for all steps of a sampling run, so that values that depend only on ``text`` are computed
                at the first step only.

        Returns:
            The noise, eps = (x - a) / (|1 - b| + 1e-5), in the dtype of ``x``.

        Raises:
            UsageError: The number of texts is not a multiple of the batch size.
        """
        if text.shape[0] % x.shape[0]:
            raise UsageError(
                f"got {text.shape[0]} texts for {x.shape[0]} latents: give one, or the same number, per latent"
            )
        dtype = self.projection.weight.dtype
        cache = {} if cache is None else cache
        if "text" not in cache:
            cache["text"] = (self.cond_mapper(text.to(dtype)),)
        mapped = cache["text"][0]
        y = self.projection(x.to(dtype).permute(0, 2, 3, 1).contiguous())
        embedding = timestep_embedding(t, self.c_r, dtype)
        for index, block in enumerate(self.blocks):
            if isinstance(block, AttnBlock):
                y, cache[f"blocks.{index}"] = block(y, mapped, cache.get(f"blocks.{index}"))
            elif isinstance(block, TimestepBlock):
                y = block(y, embedding.repeat(y.shape[0] // x.shape[0], 1))
            else:
                y = block(y)
        a, b = self.out(y).permute(0, 3, 1, 2).to(x.dtype).chunk(2, dim=1)
        return diffusion.noise_from_prior(x.repeat(a.shape[0] // x.shape[0], 1, 1, 1), a, b).contiguous()
