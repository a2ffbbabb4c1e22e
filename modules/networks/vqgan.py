"""Stage A: the 4x VQGAN between pixels and latents, and the discriminator for its training."""

from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ... import UsageError
from .base import Network, Presets
from .layers import Conv, ConvTranspose, Pointwise, Shuffle, Unshuffle, check_size, layer_norm


class MixingResidualBlock(nn.Module):
    """Depthwise and channelwise mixing, each with a norm, a scalar scale and shift, and a scalar gate.

    All six scalars start at zero, so that a new block is the identity.
    """

    def __init__(self, c: int, c_hidden: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(c)
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, kernel_size=3, groups=c))
        self.norm2 = layer_norm(c)
        self.channelwise = nn.Sequential(nn.Linear(c, c_hidden), nn.GELU(), nn.Linear(c_hidden, c))
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Float[Tensor, "batch h w c"]) -> Float[Tensor, "batch h w c"]:
        """Add both mixtures to ``x``."""
        g = self.gammas
        y = torch.addcmul(g[1], self.norm1(x), 1 + g[0])
        y = self.depthwise(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = torch.addcmul(x, y, g[2])
        y = torch.addcmul(g[4], self.norm2(x), 1 + g[3])
        return torch.addcmul(x, self.channelwise(y), g[5])


class Quantized(NamedTuple):
    """Latents snapped to the codebook.

    Attributes:
        latents: Quantized latents, (batch, 4, h, w); their gradient passes straight through to the unquantized ones.
        indices: Index of each code, (batch, h, w).
        loss: Distance of the codes to the latents plus ``beta`` times that of the latents to the codes.
    """

    latents: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """Nearest neighbor in a codebook (van den Oord et al., equation 3), with the commitment weighted by ``beta``."""

    def __init__(self, num_embeddings: int, c: int, beta: float = 0.25, rows_at_once: int = 8192) -> None:
        super().__init__()
        self.beta, self.rows_at_once = beta, rows_at_once
        self.embedding = nn.Embedding(num_embeddings, c)
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)

    def forward(self, z: Float[Tensor, "batch c h w"]) -> Quantized:
        """Snap each pixel of ``z`` to its nearest code, computing distances for ``rows_at_once`` pixels at a time."""
        pixels = z.permute(0, 2, 3, 1)
        codes = self.embedding.weight
        with torch.no_grad():
            rows = torch.split(pixels.flatten(0, 2).to(codes.dtype), self.rows_at_once)
            indices = torch.cat([torch.cdist(part, codes).argmin(dim=1) for part in rows]).view(pixels.shape[:3])
        nearest = self.embedding(indices)
        loss = F.mse_loss(nearest, pixels.detach()) + self.beta * F.mse_loss(pixels, nearest.detach())
        straight = pixels + (nearest - pixels).detach()
        return Quantized(straight.permute(0, 3, 1, 2).contiguous(), indices, loss)


class VQGAN(Network):
    """Würstchen's Stage A: images in [0, 1] to 4x smaller latents with four channels and back (arXiv 2306.00637).

    Args:
        in_channels: Channels of images.
        out_channels: Channels of reconstructions.
        up_down_scale_factor: Factor of the pixel (un)shuffle next to the images.
        levels: Number of resolutions; each halves the one before.
        bottleneck_blocks: Number of decoder blocks at the lowest resolution.
        embed_dim: Width at the lowest resolution.
        latent_channels: Channels of latents and codes.
        num_vq_embeddings: Number of codes.
        scale_factor: Divisor of the latents that Stage B works on.
    """

    diffusers_class = "PaellaVQModel"
    _no_split_modules: ClassVar[list[str]] = ["MixingResidualBlock"]
    presets: ClassVar[Presets] = {
        "tiny": {"bottleneck_blocks": 1, "embed_dim": 32, "num_vq_embeddings": 64},
        "small": {"bottleneck_blocks": 4, "embed_dim": 192, "num_vq_embeddings": 4096},
        "paper": {},
        "released": {},
    }

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_down_scale_factor: int = 2,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        embed_dim: int = 384,
        latent_channels: int = 4,
        num_vq_embeddings: int = 8192,
        scale_factor: float = 0.3764,
    ) -> None:
        arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__(**arguments)
        self.scale_factor = scale_factor
        self.compression = up_down_scale_factor * 2 ** (levels - 1)
        widths = [embed_dim // 2**i for i in reversed(range(levels))]
        patch = up_down_scale_factor**2
        self.in_block = nn.Sequential(Unshuffle(up_down_scale_factor), Pointwise(in_channels * patch, widths[0]))
        down: list[nn.Module] = [MixingResidualBlock(widths[0], widths[0] * 4)]
        for before, c in pairwise(widths):
            down += [Conv(before, c, kernel_size=4, stride=2, padding=1), MixingResidualBlock(c, c * 4)]
        head = nn.Sequential(
            nn.Conv2d(widths[-1], latent_channels, kernel_size=1, bias=False), nn.BatchNorm2d(latent_channels)
        )
        self.down_blocks = nn.Sequential(*down, head)
        self.vquantizer = VectorQuantizer(num_vq_embeddings, latent_channels)
        up: list[nn.Module] = [nn.Sequential(Pointwise(latent_channels, widths[-1]))]
        up += [MixingResidualBlock(widths[-1], widths[-1] * 4) for _ in range(bottleneck_blocks)]
        for before, c in pairwise(reversed(widths)):
            up += [ConvTranspose(before, c, kernel_size=4, stride=2, padding=1), MixingResidualBlock(c, c * 4)]
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(Pointwise(widths[0], out_channels * patch), Shuffle(up_down_scale_factor))

    def encode(self, images: Float[Tensor, "batch c_image h w"]) -> Float[Tensor, "batch c h_latent w_latent"]:
        """Return the latents before quantization, normalized by the encoder's BatchNorm."""
        check_size("images", images, self.compression)
        x = self.in_block(images)
        for block in self.down_blocks[:-1]:
            x = block(x)
        latents: Tensor = self.down_blocks[-1](x.permute(0, 3, 1, 2))
        return latents.contiguous()

    def quantize(self, latents: Float[Tensor, "batch c h w"]) -> Quantized:
        """Snap latents to the codebook."""
        out: Quantized = self.vquantizer(latents)
        return out

    def decode(self, latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c_image h_image w_image"]:
        """Decode latents into images, not clamped."""
        images: Tensor = self.out_block(self.up_blocks(latents.permute(0, 2, 3, 1).contiguous()))
        return images.contiguous()

    def forward(
        self, images: Float[Tensor, "batch c_image h w"], quantize: bool = True
    ) -> tuple[Float[Tensor, "batch c_image h w"], Quantized | None]:
        """Reconstruct images, with or without quantization."""
        latents = self.encode(images)
        quantized = self.quantize(latents) if quantize else None
        return self.decode(latents if quantized is None else quantized.latents), quantized

    def to_latents(self, images: Float[Tensor, "batch c_image h w"]) -> Float[Tensor, "batch c h_latent w_latent"]:
        """Encode images into Stage B's latent space: not quantized, divided by ``scale_factor``."""
        return self.encode(images) / self.scale_factor

    def to_images(self, latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c_image h_image w_image"]:
        """Decode latents of Stage B's space into images, clamped to [0, 1]."""
        return self.decode(latents * self.scale_factor).clamp(0, 1)


class PatchDiscriminator(Network):
    """Stage A's discriminator: one logit (positive: real) per patch; spectral norm, InstanceNorm, LeakyReLU 0.2.

    Args:
        c_in: Channels of images.
        c_hidden: Width of the last layers, halved for each layer before them.
        depth: Number of stride-2 convolutions; a patch is ``2**depth`` pixels wide.
    """

    diffusers_class = "PatchDiscriminator"
    _no_split_modules: ClassVar[list[str]] = []
    presets: ClassVar[Presets] = {
        "tiny": {"c_hidden": 64, "depth": 3},
        "small": {"c_hidden": 256, "depth": 5},
        "paper": {},
        "released": {},
    }

    def __init__(self, c_in: int = 3, c_hidden: int = 512, depth: int = 6) -> None:
        super().__init__(c_in=c_in, c_hidden=c_hidden, depth=depth)
        halvings = max(depth - 3, 3)
        widths = [c_hidden // 2 ** max(halvings - i, 0) for i in range(depth)]
        layers: list[nn.Module] = []
        for before, c in zip([c_in, *widths], widths, strict=False):
            layers.append(spectral_norm(nn.Conv2d(before, c, kernel_size=3, stride=2, padding=1)))
            layers += [nn.InstanceNorm2d(c)] if len(layers) > 1 else []
            layers.append(nn.LeakyReLU(0.2))
        self.encoder = nn.Sequential(*layers)
        self.logits = nn.Conv2d(widths[-1], 1, kernel_size=1)

    def forward(self, images: Float[Tensor, "batch c_image h w"]) -> Float[Tensor, "batch 1 h_patch w_patch"]:
        """Return the logit of each patch.

        Raises:
            UsageError: The image is not larger than one patch, which InstanceNorm requires.
        """
        h, w = images.shape[-2:]
        if max(h, w) <= (patch := 2 ** self.config["depth"]):
            raise UsageError(f"images of {h}x{w} have one patch of {patch} pixels: give larger ones or a smaller depth")
        logits: Tensor = self.logits(self.encoder(images))
        return logits
