"""Evaluate a cascade on captioned images: PSNR and SSIM of reconstructions, FID and CLIP score of drawn pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from tqdm import tqdm

from ..callbacks.samples.image_quality import INCEPTION_FILE, Clip, ImageJudge, load_inception
from ..datamodules.corpora.images import ImageRows, ImageShards
from ..datamodules.image_reader import CropSettings, ImageReader
from ..datamodules.imaging.filters import Filters
from ..datamodules.sampling.micro_batches import EvaluationRows, as_is
from ..modules.networks import diffusion
from ..modules.pipeline.text_to_image import TextToImage
from ..modules.shared.batches import Batch, generators, pixels
from ..modules.shared.image_metrics import psnr, ssim

MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}


@dataclass(frozen=True)
class Drawing:
    """Settings for drawing pictures.

    Args:
        prior_steps: Sampling steps of Stage C.
        guidance: Guidance scale of Stage C.
        steps: Sampling steps of Stage B.
    """

    prior_steps: int = 60
    guidance: float = 4.0
    steps: int = 12


def evaluate_images(
    folder: str,
    corpus: str,
    image_size: int,
    *,
    prior: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    inception: str | None = None,
    clip: str | None = None,
    drawing: Drawing | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[dict[str, Any], list[str]]:
    """Compare an exported cascade's pictures with a corpus of captioned images.

    The picture drawn for an image depends only on its place in the corpus.

    Args:
        folder: Folder written by ``rewurst export diffusers``.
        corpus: Folder of images, with ``index.json``.
        image_size: Side in pixels to which images are resized and center-cropped.
        prior: Folder of the prior, if it is separate.
        limit: Number of images; all by default.
        batch_size: Number of images at a time.
        inception: File of torch-fidelity's Inception weights (``pt_inception-2015-12-05-6726825d.pth``), for FID.
        clip: Folder or hub name of a CLIP model with its processor, for the CLIP score.
        drawing: Settings for drawing pictures.
        device: Device to run on, such as "cuda".
        dtype: Data type of the networks.

    Returns:
        ``images``; ``A`` and ``B`` with the mean ``psnr`` (dB, mean over images) and ``ssim`` of reconstructions
        through Stage A, and through the compressor and Stage B; ``C`` with ``fid`` and ``clip_score`` of pictures drawn
        for the captions. Also lines that say what was left out and why.

    Raises:
        UsageError: The folder, corpus or a file of weights cannot be read, or the size does not fit.
    """
    drawing = drawing or Drawing()
    pipeline = TextToImage.from_folder(folder, prior, getattr(torch, dtype), device)
    pipeline.check_size("image_size", image_size)
    judge, missing = _judge(inception, clip, device)
    means: dict[tuple[str, str], MeanMetric] = {}
    names = ["A"] if pipeline.compressor is None else ["A", "B"]
    if pipeline.compressor is None:
        missing.append(f"B: {folder} has no compressor; export Stage B with it")
    count = 0
    for batch in tqdm(validation_images(corpus, image_size, batch_size, limit), desc=corpus, unit=" batches"):
        images = pixels(batch).to(device)
        count += len(images)
        reconstructions = reconstruct(pipeline, images, batch, drawing.steps)
        for name in names:
            for measure, function in MEASURES.items():
                mean = means.setdefault((name, measure), MeanMetric())
                mean.update(function(reconstructions[name], images).double().cpu())
        if judge.measures:
            judge.take_images(images)
            judge.take_drawn(draw(pipeline, batch, image_size, drawing), batch["caption"])
    found: dict[str, Any] = {"images": count, "image_size": image_size}
    for (name, measure), mean in means.items():
        found.setdefault(name, {})[measure] = float(mean.compute())
    if judge.measures:
        found["C"] = judge.compute()
    return found, missing


@torch.no_grad()
def reconstruct(pipeline: TextToImage, images: Tensor, batch: Batch, steps: int) -> dict[str, Tensor]:
    """Return images (n, 3, h, w) in [0, 1] passed through Stage A and, if there is a compressor, drawn by B from z."""
    vqgan = pipeline.vqgan
    dtype = next(vqgan.parameters()).dtype
    through = {"A": vqgan.to_images(vqgan.to_latents(images.to(dtype))).float()}
    if pipeline.compressor is not None:
        z = pipeline.compressor(images).float()
        text = pipeline.text_encoder.encode(batch["caption"])
        latents = pipeline.decode_embeddings(z, text, diffusion.timesteps(steps), generator=generators(batch))
        through["B"] = pipeline.pixels(latents).float()
    return through


def draw(pipeline: TextToImage, batch: Batch, side: int, drawing: Drawing) -> Tensor:
    """Return pictures (n, 3, side, side) in [0, 1] drawn for a batch's captions."""
    randomness: list[Generator] | None = generators(batch)
    drawn: Any = pipeline(
        batch["caption"],
        side,
        side,
        prior_num_inference_steps=drawing.prior_steps,
        prior_guidance_scale=drawing.guidance,
        num_inference_steps=drawing.steps,
        generator=randomness,
        output_type="pt",
    )
    pictures: Tensor = drawn.images
    return pictures.float()


def _judge(inception: str | None, clip: str | None, device: str) -> tuple[ImageJudge, list[str]]:
    """Return a judge of drawn pictures, and lines about measures that lack weights."""
    missing = [] if inception else [f"FID: give --inception, the file {INCEPTION_FILE} of torch-fidelity"]
    missing += [] if clip else ["CLIP score: give --clip, a folder or hub name of a CLIP model"]
    network = load_inception(inception) if inception else None
    return ImageJudge(network, Clip(clip) if clip else None, device), missing


def validation_images(corpus: str, side: int, batch_size: int, limit: int | None) -> Iterator[Batch]:
    """Yield batches of readable images, without padding rows."""
    rows = ImageRows(ImageShards(corpus), Filters(), [(side, side)])
    reader = ImageReader([rows], CropSettings([(side, side)], random_crop=False))
    left = len(rows.shards) if limit is None else limit
    loader = DataLoader(EvaluationRows(rows, reader, batch_size), batch_size=None, collate_fn=as_is)  # type: ignore[arg-type]
    for batch in loader:
        chosen = [i for i in range(len(batch["image"])) if batch["valid"][i]][:left]
        left -= len(chosen)
        if chosen:
            yield {
                "image": batch["image"][chosen],
                "caption": [batch["caption"][i] for i in chosen],
                "seed": batch["seed"][chosen],
            }
        if left <= 0:
            return


def table(found: dict[str, Any]) -> str:
    """Return the results of ``evaluate_images`` as a table."""
    lines = ["| | PSNR (dB) | SSIM | FID | CLIP score |", "|---|---|---|---|---|"]
    for name in ("A", "B", "C"):
        if name in found:
            values = [found[name].get(key, math.nan) for key in ("psnr", "ssim", "fid", "clip_score")]
            shown = ["" if math.isnan(value) else f"{value:.4g}" for value in values]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)
