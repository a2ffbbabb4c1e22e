"""Stage B's residual block, conditioned on the compressor's latents."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Conv, layer_norm, mlp


class ConditionedResBlock(nn.Module):
    """Residual block whose MLP also takes skip channels and the compressor's latents as input.

    The weights expect the input ``[x, skip, condition]``, where the condition is the latents mapped from 16 to
    ``c_cond`` channels by a 1x1 convolution. Both maps are linear, so their product (16 channels wide) gives the same
    result without the wide map: less arithmetic than the ``c`` channels of ``x`` need, and no concatenation.
    """

    def __init__(self, c: int, c_skip: int = 0, c_cond: int = 0, kernel_size: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = [c, c_skip, c_cond]
        self.depthwise = Conv(c, c, kernel_size=kernel_size, padding=kernel_size // 2, groups=c)
        self.norm = layer_norm(c)
        self.channelwise = mlp(c + c_skip + c_cond, c, dropout)

    def forward(
        self,
        x: Float[Tensor, "batch h w c"],
        skip: Float[Tensor, "batch h w c_skip"] | None = None,
        latents: Float[Tensor, "batch h w c_latent"] | None = None,
        mapper: tuple[Tensor, Tensor] | None = None,
        folded: tuple[Tensor, ...] | None = None,
    ) -> tuple[Float[Tensor, "batch h w c"], tuple[Tensor, ...]]:
        """Add the block's response to ``x``.

        Args:
            x: Pixels.
            skip: Skip channels from the downward path.
            latents: The compressor's latents at this size.
            mapper: Weight and bias of the map from the latents to the condition.
            folded: Product of both maps, as an earlier call returned it.

        Returns:
            The pixels, and the product of both maps to pass in at the next step.
        """
        first = self.channelwise[0]
        assert isinstance(first, nn.Linear)
        w_x, w_skip, w_condition = torch.split(first.weight, self.sizes, dim=1)
        if folded is None:
            folded = (first.bias,) if mapper is None else fold(w_condition, first.bias, *mapper)
        y: Tensor = self.norm(self.depthwise(x))
        condition = None if latents is None else F.linear(latents, *folded)
        hidden = F.linear(y, w_x, folded[-1]) if condition is None else accumulate(condition, y, w_x)
        if skip is not None:
            hidden = accumulate(hidden, skip, w_skip)
        for layer in list(self.channelwise)[1:]:
            hidden = layer(hidden)
        return x + hidden, folded


def fold(
    outer: Float[Tensor, "c c_cond"],
    outer_bias: Float[Tensor, " c"],
    inner: Float[Tensor, "c_cond c_latent 1 1"],
    inner_bias: Float[Tensor, " c_cond"],
) -> tuple[Float[Tensor, "c c_latent"], Float[Tensor, " c"]]:
    """Return weight and bias of the linear map that equals ``inner`` followed by ``outer``."""
    return outer @ inner.flatten(1), outer_bias + outer @ inner_bias


def accumulate(
    total: Float[Tensor, "batch h w c_out"], x: Float[Tensor, "batch h w c"], weight: Float[Tensor, "c_out c"]
) -> Float[Tensor, "batch h w c_out"]:
    """Return ``total + x weight^T`` in one matrix product, which saves concatenating the inputs."""
    flat, y = total.flatten(0, 2), x.flatten(0, 2)
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return torch.addmm(flat, y, weight.t()).view_as(total)
    return flat.addmm_(y, weight.t()).view_as(total)
