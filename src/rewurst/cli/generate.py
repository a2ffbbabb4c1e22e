"""Commands of ``rewurst generate`` that draw pictures."""

from __future__ import annotations

import io
import os
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
    batch_size: int = 16,
) -> None:
    """Draw pictures for a prompt, and write each batch of them as soon as it is drawn.

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
        batch_size: Number of pictures that are drawn at once.
    """
    import torch
    from tqdm import tqdm

    from ..modules.pipeline.prompts import read_prompts
    from ..modules.pipeline.text_to_image import TextToImage

    prompts = [text for text in read_prompts(prompt) for _ in range(images)]
    numbers = {"images": images, "height": height, "width": width, "prior_steps": prior_steps, "steps": steps}
    _check_numbers(numbers | {"batch_size": batch_size})
    _check_out(out)
    _check_device(device)
    pipeline = TextToImage.from_folder(folder, prior, getattr(torch, dtype), device)
    first = torch.seed() % 2**31 if seed is None else seed
    with tqdm(desc="pictures", total=len(prompts), unit="picture", disable=len(prompts) <= batch_size) as bar:
        for begin in range(0, len(prompts), batch_size):
            batch = prompts[begin : begin + batch_size]
            pictures = pipeline(
                batch,
                height,
                width,
                prior_num_inference_steps=prior_steps,
                prior_guidance_scale=guidance,
                num_inference_steps=steps,
                decoder_guidance_scale=decoder_guidance,
                negative_prompt=negative_prompt,
                seed=first + begin,
                progress=bool(bar.disable),
            )
            for index, picture in enumerate(pictures.images, begin):  # type: ignore[union-attr]  # never a tuple here
                _save(picture, out if len(prompts) == 1 else out.with_stem(f"{out.stem}-{index}"))
            bar.update(len(batch))


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

    _check_numbers({"steps": steps})
    _check_out(out)
    pipeline, original = TextToImage.from_folder(folder), Image.fromarray(read_image(image))
    images = pipeline.reconstruct(original, num_inference_steps=steps, seed=seed, progress=True)
    width, height = images.original.size
    row = Image.new("RGB", (3 * width, height))
    for index, picture in enumerate(images):
        row.paste(picture, (index * width, 0))
    _save(row, out)


def _check_numbers(numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} is {number}, expected 1 or more")


def _check_out(out: Path) -> None:
    """Raise if no picture can be written, before any time is spent on one; nothing is made yet."""
    from PIL import Image

    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), Image.registered_extensions().get(out.suffix.lower(), ""))
    except (OSError, ValueError, KeyError):
        raise UsageError(f"{out} cannot be written: {out.suffix or 'no suffix'} is not a format, try .png") from None
    if out.is_dir():
        raise UsageError(f"{out} is a folder: give the name of an image file")
    above = next(folder for folder in (*out.parents, Path()) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"{out} cannot be written: {above} is {'not writable' if above.is_dir() else 'a file'}")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def _save(picture: Any, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out} cannot be written: {error}") from error
    print(out)
