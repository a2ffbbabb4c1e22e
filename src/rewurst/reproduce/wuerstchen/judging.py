"""Judge pictures by the attributes of drawn shapes (nearest rendering), FID to real pictures, and PSNR."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ...callbacks.samples.image_quality import ImageJudge, load_inception
from ...evaluation.images import validation_images
from ...modules import LatentDiffusion, StageB, StageC
from ...modules.shared.batches import generators, pixels
from ...modules.shared.image_metrics import psnr, ssim
from ...preparation.sources.pictures import shapes
from ...preparation.sources.pictures.shapes import Judge, Shape

BATCH = 48
Pixels = NDArray[np.uint8]
Drawer = StageC | LatentDiffusion


def prompts_of(count: int) -> list[Shape]:
    """Return random combinations to draw: ``count`` seen in training and as many unseen ones."""
    unseen = shapes.held_out()
    shown = [shape for shape in shapes.combinations() if shape not in set(unseen)]
    return [*random.Random(0).sample(shown, count), *random.Random(0).sample(unseen, min(count, len(unseen)))]


def draw_for_prompts(module: Drawer, asked: Sequence[Shape], side: int) -> Pixels:
    """Return pictures (n, side, side, 3); the noise of a picture depends only on its place, not on the module."""
    drawn = []
    for first in range(0, len(asked), BATCH):
        captions = [shapes.caption(shape) for shape in asked[first : first + BATCH]]
        seeds = range(first, first + len(captions))
        drawn.append(as_bytes(draw(module, captions, side, [Generator().manual_seed(seed) for seed in seeds])))
    return np.concatenate(drawn)


def draw(module: Drawer, captions: Sequence[str], side: int, randomness: list[Generator] | None) -> Tensor:
    """Return pictures (n, 3, side, side) in [0, 1]."""
    if isinstance(module, StageC):
        return module.draw(captions, module.compressor.module.latent_size((side, side)), randomness)
    return module.draw(captions, (side // module.stage_a.module.compression,) * 2, randomness)


def read_attributes(asked: Sequence[Shape], pictures: Pixels) -> dict[str, float]:
    """Return the shares of pictures in which each attribute, and all of them, are as requested.

    ``all`` is over all pictures; ``seen`` and ``unseen`` are over combinations with and without training pictures.
    """
    found = Judge(pictures.shape[1]).read(pictures)
    pairs = list(zip(found, asked, strict=True))
    shares = {name: _share(getattr(f, name) == getattr(a, name) for f, a in pairs) for name in Shape._fields}
    unseen = set(shapes.held_out())
    return {
        **shares,
        "all": _share(f == a for f, a in pairs),
        "seen": _share(f == a for f, a in pairs if a not in unseen),
        "unseen": _share(f == a for f, a in pairs if a in unseen),
    }


def reconstructed(module: StageB, val: dict[str, str], side: int, count: int, drawn: bool) -> dict[str, Any]:
    """Return PSNR and SSIM of Stage B's reconstructions of validation images and, for shapes, kept attributes."""
    by_caption = {shapes.caption(shape): shape for shape in shapes.combinations()}
    asked: list[Shape] = []
    pictures: list[Pixels] = []
    values: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    for batch in _images(val, side, count):
        images, through = pixels(batch), module.reconstruct(batch)
        values["psnr"].append(psnr(through, images))
        values["ssim"].append(ssim(through, images))
        if drawn:
            asked += [by_caption[caption] for caption in batch["caption"]]
            pictures.append(as_bytes(through))
    found: dict[str, Any] = {name: float(torch.cat(each).mean()) for name, each in values.items()}
    return found | (read_attributes(asked, np.concatenate(pictures)) if drawn else {})


def scored_by_fid(module: Drawer, val: dict[str, str], side: int, count: int, inception: str) -> dict[str, float]:
    """Return the FID between validation images and pictures drawn for their captions."""
    judge = ImageJudge(load_inception(inception), None)
    for batch in _images(val, side, count):
        judge.take_images(pixels(batch))
        judge.take_drawn(draw(module, batch["caption"], side, generators(batch)), batch["caption"])
    return judge.compute()


def _images(val: dict[str, str], side: int, count: int) -> Iterator[dict[str, Any]]:
    for path in val.values():
        yield from validation_images(path, side, BATCH, count)


def _share(right: Iterator[bool]) -> float:
    values = list(right)
    return float(np.mean(values)) if values else 0.0


def as_bytes(pictures: Tensor) -> Pixels:
    """Return pictures (n, 3, h, w) in [0, 1] as bytes (n, h, w, 3)."""
    scaled = (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).numpy()
