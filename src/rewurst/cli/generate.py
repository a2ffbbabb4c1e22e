"""Commands of ``rewurst generate`` that draw pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from .. import UsageError


def image(
    folder: str,
    prompt: str,
    out: Path,
    prior: str | None = None,
    negative_prompt: str | None = None,
    images: int = 1,
    height: int = 512,
    width: int = 512,
    prior_steps: int = 60,
    guidance: float = 4.0,
    steps: int = 12,
    decoder_guidance: float = 0.0,
    seed: int | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Draw pictures for a prompt.

    Args:
        folder: Exported cascade, or its decoder folder (with --prior).
        prompt: Prompt, or @FILE with one prompt per line.
        out: Image file; several become NAME-0, NAME-1, ...
        prior: Folder of the prior if it is not part of FOLDER.
        negative_prompt: Text to guide away from.
        images: Number of pictures per prompt.
        height: Height in pixels.
        width: Width in pixels.
        prior_steps: Sampling steps of Stage C.
        guidance: Guidance scale of Stage C.
        steps: Sampling steps of Stage B.
        decoder_guidance: Guidance scale of Stage B; up to 1 there is none (the paper: 4, diffusers: none).
        seed: Seed of the first picture (default: a new one).
        device: Device to draw on, such as cuda.
        dtype: Precision of the networks.
    """
    import torch

    from ..modules.pipeline.prompts import read_prompts
    from ..modules.pipeline.text_to_image import TextToImage

    prompts = read_prompts(prompt)
    pipeline = TextToImage.from_folder(folder, prior, getattr(torch, dtype), device)
    pictures = pipeline(
        prompts,
        height,
        width,
        prior_num_inference_steps=prior_steps,
        prior_guidance_scale=guidance,
        num_inference_steps=steps,
        decoder_guidance_scale=decoder_guidance,
        negative_prompt=negative_prompt,
        num_images_per_prompt=images,
        seed=torch.seed() % 2**31 if seed is None else seed,
        progress=True,
    )
    drawn = pictures.images  # type: ignore[union-attr]  # a tuple only with return_dict=False
    for index, picture in enumerate(drawn):
        _save(picture, out if len(drawn) == 1 else out.with_stem(f"{out.stem}-{index}"))


def reconstruction(folder: str, image: Path, out: Path, steps: int = 12, seed: int = 0) -> None:
    """Show an image next to what Stage A, and Stage B from its embedding, make of it.

    Args:
        folder: Exported cascade with its compressor.
        image: Image file.
        out: Image file to write: original, Stage A, Stage B.
        steps: Sampling steps of Stage B.
        seed: Seed of Stage B's noise.
    """
    from PIL import Image

    from ..datamodules.imaging.decoding import read_image
    from ..modules.pipeline.text_to_image import TextToImage

    pipeline, original = TextToImage.from_folder(folder), Image.fromarray(read_image(image))
    images = pipeline.reconstruct(original, num_inference_steps=steps, seed=seed, progress=True)
    width, height = images.original.size
    row = Image.new("RGB", (3 * width, height))
    for index, picture in enumerate(images):
        row.paste(picture, (index * width, 0))
    _save(row, out)


def _save(picture: Any, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out} cannot be written: {error}") from error
    print(out)
