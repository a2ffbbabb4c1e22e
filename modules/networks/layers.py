"""Layers that Stages A, B and C share, all channels-last.

Inside a network an image-shaped tensor is ``(batch, height, width, channels)`` and contiguous. Norms and linear layers
use it directly, and convolutions use it, without a copy, in PyTorch's channels-last memory format. Weights have the
names and shapes of diffusers' classes, so that they are exchanged without conversion.
"""

import math
from collections.abc import MutableMapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ... import UsageError

ConditionCache: TypeAlias = MutableMapping[str, tuple[Tensor, ...]]
"""Values computed once per sampling run, by block. Pass the same, initially empty, dict to all steps of a run."""


AUTHORS_WIDTH = 1024
"""Smallest width of the layers that the paper and the release initialize with N(0, 0.02)."""


class Unshuffle(nn.PixelUnshuffle):
    """Pixel unshuffle from channels-first to channels-last, at a network's input."""

    def forward(self, x: Float[Tensor, "batch c_in h_in w_in"]) -> Float[Tensor, "batch h w c"]:
        """Fold patches into channels."""
        return super().forward(x).permute(0, 2, 3, 1).contiguous()


class Shuffle(nn.PixelShuffle):
    """Pixel shuffle from channels-last to channels-first, at a network's output."""

    def forward(self, x: Float[Tensor, "batch h w c"]) -> Float[Tensor, "batch c_out h_out w_out"]:
        """Unfold channels into patches."""
        return super().forward(x.permute(0, 3, 1, 2))


class Conv(nn.Conv2d):
    """``nn.Conv2d`` on channels-last tensors."""

    def forward(self, x: Float[Tensor, "batch h w c"]) -> Float[Tensor, "batch h_out w_out c_out"]:
        """Convolve; the permutations change strides only."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvTranspose(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` on channels-last tensors."""

    def forward(self, x: Float[Tensor, "batch h w c"], output_size: list[int] | None = None) -> Tensor:
        """Convolve; the permutations change strides only."""
        return super().forward(x.permute(0, 3, 1, 2), output_size).permute(0, 2, 3, 1)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, which on channels-last tensors is a linear layer."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True) -> None:
        super().__init__(c_in, c_out, kernel_size=1, bias=bias)

    def forward(self, x: Float[Tensor, "batch h w c"]) -> Float[Tensor, "batch h w c_out"]:
        """Map each pixel's channels."""
        return F.linear(x, self.weight.flatten(1), self.bias)


def layer_norm(c: int) -> nn.LayerNorm:
    """Return a layer norm over channels without parameters."""
    return nn.LayerNorm(c, elementwise_affine=False, eps=1e-6)


class GlobalResponseNorm(nn.Module):
    """Global response normalization (Woo et al., ConvNeXt V2), with the norm in float32.

    A channel's norm over all pixels exceeds 65504, float16's largest number, long before its values do, and ``1e-6``
    rounds to zero in half precision.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Float[Tensor, "batch h w c"]) -> Float[Tensor, "batch h w c"]:
        """Scale each channel by its share of the response: gamma x n + beta + x, in one pass over x."""
        norm: Tensor = PixelNorm.apply(x)
        scale = 1 + self.gamma * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


class PixelNorm(torch.autograd.Function):
    """Euclidean norm of each channel over all pixels of x (batch, h, w, c): (batch, 1, 1, c), at least float32.

    PyTorch's norm over leading dimensions is not vectorized on CPUs; the root of the sum takes a sixth of its time.
    But the root's gradient is not finite if a channel is zero. Here it is 0 then, as with PyTorch's norm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the norms."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.device.type == "cpu" and x.dtype == wide:
            norm = x.square().sum(dim=(1, 2), keepdim=True).sqrt()
        else:
            norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
        ctx.save_for_backward(x, norm)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return x / norm times the norm's gradient."""
        x, norm = ctx.saved_tensors
        back: Tensor = x * torch.where(norm > 0, grad / norm, 0.0).to(x.dtype)
        return back


class ResBlock(nn.Module):
    """Depthwise convolution, then an MLP over channels with global response normalization."""

    def __init__(self, c: int, kernel_size: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.depthwise = Conv(c, c, kernel_size=kernel_size, padding=kernel_size // 2, groups=c)
        self.norm = layer_norm(c)
        self.channelwise = mlp(c, c, dropout)

    def forward(self, x: Float[Tensor, "batch h w c"]) -> Float[Tensor, "batch h w c"]:
        """Add the block's response to ``x``."""
        y: Tensor = self.channelwise(self.norm(self.depthwise(x)))
        return x + y


def mlp(c_in: int, c: int, dropout: float) -> nn.Sequential:
    """Build the MLP of the residual blocks: ``c_in`` to ``4 c`` to ``c`` channels."""
    return nn.Sequential(
        nn.Linear(c_in, c * 4), nn.GELU(), GlobalResponseNorm(c * 4), nn.Dropout(dropout), nn.Linear(c * 4, c)
    )


class TimestepBlock(nn.Module):
    """Scale and shift of all channels by a linear map of the timestep embedding."""

    def __init__(self, c: int, c_timestep: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(c_timestep, c * 2)

    def forward(
        self, x: Float[Tensor, "batch h w c"], embedding: Float[Tensor, "batch c_r"]
    ) -> Float[Tensor, "batch h w c"]:
        """Return ``x (1 + a) + b``."""
        a, b = self.mapper(embedding)[:, None, None, :].chunk(2, dim=-1)
        return torch.addcmul(b, x, 1 + a)


class Attention(nn.Module):
    """Multi-head attention with its projections, named as in diffusers."""

    def __init__(self, c: int, nhead: int, dropout: float = 0.0) -> None:
        super().__init__()
        if nhead < 1 or c % nhead:
            raise UsageError(f"c is {c} and nhead is {nhead}: nhead must divide c")
        self.nhead = nhead
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c), nn.Dropout(dropout))

    def heads(self, x: Float[Tensor, "batch n c"]) -> Float[Tensor, "batch heads n d"]:
        """Split channels into heads."""
        return x.view(*x.shape[:2], self.nhead, -1).transpose(1, 2)

    def forward(
        self,
        q: Float[Tensor, "batch heads n d"],
        k: Float[Tensor, "batch heads m d"],
        v: Float[Tensor, "batch heads m d"],
    ) -> Float[Tensor, "batch n c"]:
        """Compute attention from queries, keys and values that are already projected and split into heads."""
        out: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class AttnBlock(nn.Module):
    """Attention from the pixels to themselves and to the text.

    The text's keys and values do not depend on the image or the timestep, so ``forward`` returns them and accepts them
    at the next step of a sampling run.
    """

    def __init__(self, c: int, c_cond: int, nhead: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = layer_norm(c)
        self.attention = Attention(c, nhead, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def forward(
        self,
        x: Float[Tensor, "batch h w c"],
        text: Float[Tensor, "texts n c_cond"],
        memory: tuple[Tensor, ...] | None = None,
    ) -> tuple[Float[Tensor, "texts h w c"], tuple[Tensor, ...]]:
        """Add attention to ``x``; with several texts per image (guidance) the batch size becomes ``texts``.

        Args:
            x: Pixels. Before the first attention all texts share them, so a batch of ``texts / k`` is repeated ``k``
                times here, after the shared part has been computed once.
            text: Mapped text states.
            memory: Keys and values of ``text``, as an earlier call returned them.

        Returns:
            The pixels and the text's keys and values.
        """
        attention, tokens = self.attention, self.norm(x).flatten(1, 2)
        q, k, v = (attention.heads(to(tokens)) for to in (attention.to_q, attention.to_k, attention.to_v))
        if memory is None:
            mapped = self.kv_mapper(text)
            memory = tuple(attention.heads(to(mapped)).contiguous() for to in (attention.to_k, attention.to_v))
        if (repeats := memory[0].shape[0] // x.shape[0]) > 1:
            x, q, k, v = (y.repeat(repeats, 1, 1, 1) for y in (x, q, k, v))
        # Concatenation stores keys and values head by head, which makes attention on CPUs a quarter faster.
        k, v = torch.cat([k, memory[0]], dim=2), torch.cat([v, memory[1]], dim=2)
        return x + attention(q.contiguous(), k, v).view_as(x), memory


def timestep_embedding(t: Float[Tensor, " batch"], c_r: int, dtype: torch.dtype) -> Float[Tensor, "batch c_r"]:
    """Return sines and cosines of ``t * 10000``, in at least float32, as bfloat16 merges adjacent timesteps."""
    half = c_r // 2
    frequencies = torch.exp(torch.arange(half, device=t.device).float() * (-math.log(10000) / (half - 1)))
    angles = (t.to(torch.promote_types(t.dtype, torch.float32)) * 10000)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, c_r % 2)).to(dtype)


def check_size(what: str, x: Float[Tensor, "batch c h w"], multiple: int) -> None:
    """Check that every level can halve an image-shaped tensor.

    Raises:
        UsageError: Height or width is not a multiple of ``multiple``.
    """
    h, w = x.shape[-2:]
    if h % multiple or w % multiple:
        raise UsageError(f"{what} are {h}x{w}: height and width must be multiples of {multiple}")


def xavier(module: nn.Module) -> None:
    """Initialize linear layers and convolutions with Xavier weights and zero biases; for ``nn.Module.apply``."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Attention):  # after its layers; the authors fuse them into one matrix (3 c, c)
        for layer in (module.to_q, module.to_k, module.to_v):
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(1 / 2))
