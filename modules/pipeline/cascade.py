"""The cascade's three stages, put together: sizes, Stage C and Stage B on text states, Stage A."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ... import UsageError
from ..networks import (
    VQGAN,
    Prior,
    SemanticCompressor,
    StageBUNet,
    TextEncoder,
    compile_blocks,
    diffusion,
)
from .folders import read_cascade
from .steps import EMBEDDINGS, TEXT, OnStep, Seen, finite, wide

ORIENTATION = 0x0112  # EXIF's tag


class Cascade:
    """All networks of text to image. They run in their own dtype; what is sampled stays in float32.

    Args:
        vqgan: Stage A.
        decoder: Stage B.
        prior: Stage C.
        text_encoder: Of Stage B.
        prior_text_encoder: Of Stage C.
        compressor: Needed only to reconstruct images.
        resolution_multiple: Pixels on each side of a compressor latent.
        latent_dim_scale: Stage A latents on each side of a compressor latent.
        latent_mean: With ``latent_std`` it undoes Stage C's scale: z = x latent_mean - latent_std (diffusers' names).
        latent_std: See ``latent_mean``.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        decoder: StageBUNet,
        prior: Prior,
        text_encoder: TextEncoder,
        prior_text_encoder: TextEncoder,
        compressor: SemanticCompressor | None = None,
        resolution_multiple: float = 42.67,
        latent_dim_scale: float = 10.67,
        latent_mean: float = Prior.latent_mean,
        latent_std: float = Prior.latent_std,
    ) -> None:
        self.vqgan, self.decoder, self.prior, self.compressor = vqgan, decoder, prior, compressor
        self.text_encoder, self.prior_text_encoder = text_encoder, prior_text_encoder
        self.resolution_multiple, self.latent_dim_scale = resolution_multiple, latent_dim_scale
        self.latent_mean, self.latent_std = latent_mean, latent_std
        self._offloaded_from: torch.device | None = None

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        prior: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        compile: bool = False,  # noqa: A002 - torch's word
        variant: str | None = None,
    ) -> Self:
        """Load an export of ours, or the hub's two folders.

        Args:
            folder: What ``rewurst export diffusers`` wrote, a saved combined pipeline, or a decoder pipeline's folder.
            prior: The prior pipeline's folder, where ``folder`` is a decoder's.
            dtype: Of the networks, for example ``torch.bfloat16``.
            device: To run on.
            compile: Compile each block at its first use.
            variant: Variant of the files to prefer, such as ``fp16`` (default: the plain ones, or the only ones).

        Raises:
            UsageError: A part is missing or does not belong there.
        """
        pipeline = cls(**read_cascade(folder, prior, dtype, variant))
        for network in pipeline.networks():
            network.to(device)
            if compile:
                compile_blocks(network)
        return pipeline

    def networks(self) -> list[torch.nn.Module]:
        """Return the modules there are."""
        networks = [self.vqgan, self.decoder, self.prior, self.text_encoder, self.prior_text_encoder, self.compressor]
        return [network for network in networks if network is not None]

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return self._offloaded_from or next(self.prior.parameters()).device

    def to(self, *args: Any, **named: Any) -> Self:
        """Move all networks to a device, a dtype or both, as ``torch.nn.Module.to`` does; ends offloading."""
        self._offloaded_from = None
        for network in self.networks():
            network.to(*args, **named)
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> Self:
        """Keep the networks in the CPU's memory, and each on a device only while it works; arguments as in diffusers.

        Args:
            gpu_id: Number of the device.
            device: Device that they work on.
        """
        self.to("cpu")
        self._offloaded_from = (
            torch.device(device) if gpu_id is None else torch.device(torch.device(device).type, gpu_id)
        )
        return self

    @contextmanager
    def at_work(self, network: torch.nn.Module) -> Iterator[None]:
        """Have a network on the device that it works on, within the block."""
        if self._offloaded_from is None:
            yield
            return
        network.to(self._offloaded_from)
        try:
            yield
        finally:
            network.to("cpu")

    def fits(self, pixels: int) -> bool:
        """Say whether a picture of this height or width comes out as asked for and passes Stage B's levels."""
        latents = int(math.ceil(pixels / self.resolution_multiple) * self.latent_dim_scale)
        return latents * self.vqgan.compression == pixels and latents % self.decoder.multiple == 0

    def check_size(self, name: str, pixels: int) -> None:
        """Refuse a height or width that does not fit.

        Raises:
            UsageError: Names the nearest sizes that do.
        """
        if pixels < 1 or not self.fits(pixels):
            near = [p for p in range(1, 2 * max(pixels, 0) + 1024) if self.fits(p)]
            sizes = " or ".join(str(p) for p in sorted(sorted(near, key=lambda p: abs(p - pixels))[:2]))
            raise UsageError(f"{name}={pixels} does not fit this model's stages: the nearest that fit are {sizes}")

    def draw_embeddings(
        self,
        text: Float[Tensor, "texts n c"],
        size: tuple[int, int],
        times: Sequence[float],
        guidance_scale: float,
        generator: diffusion.Randomness = None,
        noise: Float[Tensor, "batch c_latent h w"] | None = None,
        callback: OnStep | None = None,
    ) -> Float[Tensor, "batch c_latent h w"]:
        """Run Stage C and undo its scale; with guidance ``text`` is the wanted states, then the unwanted ones."""
        guided = guidance_scale > 1
        shape = (text.shape[0] // (2 if guided else 1), self.prior.config["c_in"], *size)
        if noise is not None and noise.shape != shape:
            raise UsageError(f"latents have shape {tuple(noise.shape)}: this prompt and size need {shape}")
        like = torch.empty(0, dtype=wide(self.prior), device=self.device)
        x = diffusion.draw(shape, generator, like) if noise is None else noise.to(like)
        seen = Seen(callback, guided, {TEXT: text})

        def predict(x: Tensor, t: Tensor) -> Tensor:
            eps: Tensor = self.prior(x, t, seen.tensors[TEXT], seen.cache)
            return diffusion.guide(eps, guidance_scale) if guided else eps

        with self.at_work(self.prior):
            x = diffusion.sample(predict, x, times, generator, callback=seen.after_step)
        return finite(x, "Stage C", self.prior) * self.latent_mean - self.latent_std

    def decode_embeddings(
        self,
        embeddings: Float[Tensor, "batch c_latent h w"],
        text: Float[Tensor, "texts n c"],
        times: Sequence[float],
        guidance_scale: float = 0.0,
        generator: diffusion.Randomness = None,
        callback: OnStep | None = None,
    ) -> Float[Tensor, "batch c h_latent w_latent"]:
        """Run Stage B; guidance is away from no embedding and the unwanted text."""
        size = [int(side * self.latent_dim_scale) for side in embeddings.shape[-2:]]
        shape = (embeddings.shape[0], self.decoder.config["c_in"], *size)
        x = diffusion.draw(shape, generator, torch.empty(0, dtype=wide(self.decoder), device=self.device))
        seen = Seen(callback, guidance_scale > 1, {TEXT: text, EMBEDDINGS: embeddings})

        def predict(x: Tensor, t: Tensor) -> Tensor:
            effnet, text = seen.tensors[EMBEDDINGS], seen.tensors[TEXT]
            return self.decoder.guided(x, t, effnet, text, seen.cache, guidance_scale)

        with self.at_work(self.decoder):
            x = diffusion.sample(predict, x, times, generator, callback=seen.after_step)
        return finite(x, "Stage B", self.decoder)

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode Stage B's latents.

        Raises:
            UsageError: Pixels are not finite.
        """
        with self.at_work(self.vqgan):
            latents = latents.to(next(self.vqgan.parameters()).dtype)
            decoded = self.vqgan.decode(latents * self.vqgan.scale_factor)  # clamping would hide what is infinite
        return finite(decoded, "Stage A", self.vqgan).clamp(0, 1)

    def fit(self, image: Image.Image) -> Image.Image:
        """Cut the middle out of an image, to the largest size that fits within it.

        Raises:
            UsageError: The image is too small, is not RGB, or has an EXIF orientation that has not been applied:
                converting it here could show something else than training saw.
        """
        if image.mode != "RGB" or image.getexif().get(ORIENTATION, 1) != 1:
            raise UsageError(
                f"the image has mode {image.mode} and EXIF orientation {image.getexif().get(ORIENTATION, 1)}, expected "
                "upright RGB: read the file with rewurst.datamodules.imaging.decoding.decode, as training does"
            )
        sides = [next((side for side in range(given, 0, -1) if self.fits(side)), 0) for given in image.size]
        if 0 in sides:
            smallest = next(side for side in range(1, 10**6) if self.fits(side))
            raise UsageError(f"the image is {image.width}x{image.height} pixels: it needs at least {smallest} each way")
        left, top = ((given - side) // 2 for given, side in zip(image.size, sides, strict=True))
        return image.crop((left, top, left + sides[0], top + sides[1]))
