"""Text to image: Stage C draws the compressor's latents, Stage B turns them into Stage A's, Stage A into pixels."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor
from tqdm import tqdm

from ... import UsageError
from .cascade import Cascade
from .prompts import checked_times, paired, randomness_of, text_states
from .steps import EMBEDDINGS, TEXT, OnStep, finite

OnStepEnd: TypeAlias = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]
"""Called as in diffusers: (pipeline, step, time, tensors by name); what it returns by name takes their place."""
PRIOR_TENSORS = ("latents", TEXT, "negative_prompt_embeds")
DECODER_TENSORS = (*PRIOR_TENSORS, EMBEDDINGS)


@dataclass(frozen=True)
class Pictures:
    """Output of the pipeline.

    Attributes:
        images: PIL images, an array (batch, h, w, 3) or a tensor (batch, 3, h, w) in [0, 1], or latents.
    """

    images: list[Image.Image] | NDArray[np.float32] | Tensor


class Reconstruction(NamedTuple):
    """An image and what the cascade's lower stages make of it, as PIL images.

    Attributes:
        original: Cropped and resized to a size that fits.
        stage_a: Encoded and decoded by Stage A.
        stage_b: Compressed, drawn by Stage B and decoded by Stage A.
    """

    original: Image.Image
    stage_a: Image.Image
    stage_b: Image.Image


class TextToImage(Cascade):
    """Prompts to pictures: ``TextToImage.from_folder(folder)("a red circle").images``."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int = 512,
        width: int = 512,
        prior_num_inference_steps: int = 60,
        prior_timesteps: Sequence[float] | None = None,
        prior_guidance_scale: float = 4.0,
        num_inference_steps: int = 12,
        decoder_timesteps: Sequence[float] | None = None,
        decoder_guidance_scale: float = 0.0,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Float[Tensor, "prompts n c"] | None = None,
        negative_prompt_embeds: Float[Tensor, "prompts n c"] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Float[Tensor, "batch c_latent h w"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prior_callback_on_step_end: OnStepEnd | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: SupportsIndex | Iterable[Any] | None = None,
        progress: bool = False,
    ) -> Pictures | tuple[Any]:
        """Draw pictures; arguments are those of diffusers' ``WuerstchenCombinedPipeline``, and two more.

        Args:
            prompt: One or several.
            height: In pixels.
            width: In pixels.
            prior_num_inference_steps: Of Stage C.
            prior_timesteps: Times of Stage C, descending from 1 to 0, instead of evenly spaced ones.
            prior_guidance_scale: Of Stage C; up to 1 there is no guidance.
            num_inference_steps: Of Stage B.
            decoder_timesteps: Times of Stage B.
            decoder_guidance_scale: Of Stage B.
            negative_prompt: What to guide away from: one for all or one for each prompt.
            prompt_embeds: Text states for Stage C instead of prompts; Stage B then sees an empty prompt.
            negative_prompt_embeds: The same for what to guide away from.
            num_images_per_prompt: Images of one prompt stand next to each other in the result.
            generator: One for all images, or one for each.
            latents: Noise that Stage C starts from.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Return ``Pictures`` rather than a tuple.
            prior_callback_on_step_end: After each step of Stage C.
            prior_callback_on_step_end_tensor_inputs: What it is given: ``latents``, ``text_encoder_hidden_states``,
                ``negative_prompt_embeds``. What it returns of the first two is used from then on.
            callback_on_step_end: After each step of Stage B.
            callback_on_step_end_tensor_inputs: The same, and ``image_embeddings``.
            seed: Instead of ``generator``: one for each image, or the first image's, the next one having one more. An
                image depends on its own seed only, not on its neighbours or the device.
            progress: Show a bar for each stage.

        Raises:
            UsageError: Arguments do not fit each other or the model.
        """
        self.check_size("height", height)
        self.check_size("width", width)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UsageError(f"output_type={output_type!r} is unknown: choose 'pil', 'np', 'pt' or 'latent'")
        if num_images_per_prompt < 1:
            raise UsageError(f"num_images_per_prompt={num_images_per_prompt} is too few: give at least 1")
        above_step = _named(self, prior_callback_on_step_end, prior_callback_on_step_end_tensor_inputs, PRIOR_TENSORS)
        below_step = _named(self, callback_on_step_end, callback_on_step_end_tensor_inputs, DECODER_TENSORS)
        prompts, negatives = paired(prompt, negative_prompt, prompt_embeds)
        prior_times = checked_times(prior_timesteps, prior_num_inference_steps, "prior_num_inference_steps")
        decoder_times = checked_times(decoder_timesteps, num_inference_steps, "num_inference_steps")
        randomness = randomness_of(seed, generator, len(prompts) * num_images_per_prompt)
        above = [(prompts, prompt_embeds), (negatives, negative_prompt_embeds)][: 2 if prior_guidance_scale > 1 else 1]
        below = [(prompts, None), (negatives, None)][: 2 if decoder_guidance_scale > 1 else 1]
        with self.at_work(self.prior_text_encoder):
            states = text_states(self.prior_text_encoder, above, num_images_per_prompt)
        embeddings = self.draw_embeddings(
            states,
            (math.ceil(height / self.resolution_multiple), math.ceil(width / self.resolution_multiple)),
            prior_times,
            prior_guidance_scale,
            randomness,
            latents,
            _with_bar("Stage C", above_step, len(prior_times) - 1 if progress else 0),
        )
        with self.at_work(self.text_encoder):
            states = text_states(self.text_encoder, below, num_images_per_prompt)
        drawn = self.decode_embeddings(
            embeddings,
            states,
            decoder_times,
            decoder_guidance_scale,
            randomness,
            _with_bar("Stage B", below_step, len(decoder_times) - 1 if progress else 0),
        )
        images = _converted(drawn if output_type == "latent" else self.pixels(drawn), output_type)
        return Pictures(images) if return_dict else (images,)

    @torch.no_grad()
    def reconstruct(
        self,
        image: Image.Image,
        num_inference_steps: int = 12,
        prompt: str = "",
        seed: SupportsIndex | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        """Reconstruct an image through A, and through the compressor and B.

        Raises:
            UsageError: There is no compressor, or the image is smaller than any size that fits.
        """
        if self.compressor is None:
            raise UsageError("this model has no compressor: export Stage B with its Semantic Compressor")
        fitted = self.fit(image)
        pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).permute(2, 0, 1)[None].to(self.device)
        dtype = next(self.vqgan.parameters()).dtype
        with self.at_work(self.compressor):
            embeddings = self.compressor(pixels).to(torch.float32)
        with self.at_work(self.text_encoder):
            text = self.text_encoder.encode([prompt])
        latents = self.decode_embeddings(
            finite(embeddings, "the compressor", self.compressor),
            text,
            checked_times(None, num_inference_steps, "num_inference_steps"),
            generator=randomness_of(seed, None, 1),
            callback=_with_bar("Stage B", None, num_inference_steps if progress else 0),
        )
        with self.at_work(self.vqgan):
            through_a = self.vqgan.to_latents(pixels.to(dtype))
        a, b = (_converted(self.pixels(one), "pil")[0] for one in (through_a, latents))
        return Reconstruction(fitted, a, b)


def _named(pipeline: Any, callback: OnStepEnd | None, names: Sequence[str], known: Sequence[str]) -> OnStep | None:
    """Return a callback that is given the tensors of the names it asks for.

    Raises:
        UsageError: A name is unknown.
    """
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"callback_on_step_end_tensor_inputs has {unknown[0]!r}: choose among {', '.join(known)}")
    if callback is None:
        return None
    return lambda step, time, tensors: callback(pipeline, step, time, {name: tensors[name] for name in names})


def _with_bar(stage: str, callback: OnStep | None, steps: int) -> OnStep | None:
    """Return a callback that moves a progress bar too, if it is to have steps."""
    if not steps:
        return callback
    bar = tqdm(desc=stage, unit="step", total=steps)

    def moved(step: int, time: float, tensors: dict[str, Tensor | None]) -> dict[str, Any] | None:
        bar.update()
        if step + 1 == steps:
            bar.close()
        return callback(step, time, tensors) if callback else None

    return moved


def _converted(images: Tensor, output_type: str) -> Any:
    if output_type in ("pt", "latent"):
        return images
    array = images.permute(0, 2, 3, 1).float().cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(picture) for picture in (array * 255).round().astype(np.uint8)]
