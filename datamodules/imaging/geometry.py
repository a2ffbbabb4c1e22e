"""Which part of a picture a sample shows, and at which size: pure functions of sizes and seeds.

Sizes are (height, width); a crop is in pixels of the stored picture, upright. The picture is resized until it covers
what is wanted and the rest is cropped, both in one resampling with antialiasing (bicubic).
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ... import UsageError

Size = tuple[int, int]
Pixels = NDArray[np.uint8]

# A JPEG is reduced to no less than twice the wanted size, then resampled: 50 dB from resampling all of it.
DECODING_GAP = 2.0
NO_BUCKET = -1


class Crop(NamedTuple):
    """A rectangle of the stored picture, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def uniform(seed: int, purpose: str, count: int) -> list[float]:
    """Numbers in [0, 1) that depend on nothing but a sample's seed and what they are for."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}".encode(), digest_size=8 * count).digest()
    return [(int.from_bytes(digest[i : i + 8], "little") >> 11) / 2**53 for i in range(0, len(digest), 8)]


def crop(size: Size, target: Size, seed: int | None = None, covered: Size | None = None) -> Crop:
    """The part of a picture that is shown when it is resized to cover ``covered`` and cropped to ``target``.

    Args:
        size: Of the stored picture.
        target: What is shown.
        seed: Of the sample: the place is random. Without one it is the centre.
        covered: What the resized picture covers, at least ``target``; by default ``target``, so that only what the
            aspect ratios differ by is cropped. Stage A learns from crops of 128 pixels of pictures resized to 256.
    """
    (height, width), over = size, covered or target
    scale = max(over[0] / height, over[1] / width)
    crop_height = min(height, max(1, round(target[0] / scale)))
    crop_width = min(width, max(1, round(target[1] / scale)))
    spare_height, spare_width = height - crop_height, width - crop_width
    if seed is None:
        return Crop(spare_height // 2, spare_width // 2, crop_height, crop_width)
    y, x = uniform(seed, "crop", 2)
    return Crop(int(y * (spare_height + 1)), int(x * (spare_width + 1)), crop_height, crop_width)


def size_to_decode(size: Size, shown: Crop, target: Size) -> Size:
    """At which size a picture has to be decoded so that nothing is lost when the crop is resized to ``target``."""
    height = DECODING_GAP * target[0] * size[0] / shown.height
    width = DECODING_GAP * target[1] * size[1] / shown.width
    return min(size[0], int(np.ceil(height))), min(size[1], int(np.ceil(width)))


def resample(pixels: Pixels, size: Size, shown: Crop, target: Size) -> Pixels:
    """Crop and resize at once.

    Args:
        pixels: The decoded picture, shape (h, w, 3): as stored, or reduced by 2, 4 or 8 while it was decoded.
        size: Of the stored picture.
        shown: What to keep of it.
        target: Size of the result.

    Returns:
        Shape (*target, 3).
    """
    reduction = round(size[0] / pixels.shape[0])  # exact division: the reduced side is rounded up
    box = tuple(side / reduction for side in _edges(shown))
    if any(side % reduction for side in _edges(shown)):  # only Pillow cuts between pixels; it is several times slower
        image = Image.fromarray(pixels)
        return np.asarray(image.resize(target[::-1], Image.Resampling.BICUBIC, box=box))
    left, top, right, bottom = map(int, box)
    part = pixels[top:bottom, left:right]
    if part.shape[:2] == target:
        return part
    import torch  # not at the top: processes that prepare shards from pictures as they are do without

    channels = torch.from_numpy(np.array(part)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(channels, target, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def buckets(image_size: int, multiple: int, max_aspect: float = 2.0) -> list[Size]:
    """Sizes of about the area of a square of ``image_size``, from tall to wide, the square among them.

    As for SDXL and NovelAI: sides are multiples, the area is at most the square's (so memory is bounded by it), and no
    bucket fits into another.

    Args:
        image_size: Side of the square.
        multiple: Of which sides are multiples.
        max_aspect: Longest side over shortest.

    Raises:
        UsageError: ``image_size`` is no multiple, or the aspect is below 1.
    """
    if multiple < 1 or image_size < multiple or image_size % multiple:
        raise UsageError(f"image_size is {image_size}, expected a multiple of {multiple}")
    if not max_aspect >= 1:
        raise UsageError(f"max_aspect is {max_aspect}, expected 1 or more")
    found: set[Size] = set()
    for short in range(multiple, image_size + 1, multiple):
        long = int(min(image_size * image_size // short, max_aspect * short)) // multiple * multiple
        found |= {(short, long), (long, short)}
    inside = {a for a in found for b in found if a != b and a[0] <= b[0] and a[1] <= b[1]}
    return sorted(found - inside, key=lambda size: (size[1] / size[0], size))


def nearest_bucket(
    heights: NDArray[np.integer[Any]],
    widths: NDArray[np.integer[Any]],
    sizes: list[Size],
    max_upscale: float | None = None,
) -> NDArray[np.int64]:
    """The bucket whose aspect ratio is nearest to each picture's, on a logarithmic scale.

    Args:
        heights: Of the pictures, shape (n,); 0 where unknown.
        widths: The same.
        sizes: From ``buckets``: from tall to wide.
        max_upscale: Pictures that would have to be enlarged by more have no bucket; 1 refuses any enlargement.

    Returns:
        Numbers of buckets, shape (n,), ``NO_BUCKET`` where there is none.
    """
    h, w = heights.astype(np.int64), widths.astype(np.int64)
    known = (h > 0) & (w > 0)
    h, w = np.where(known, h, 1), np.where(known, w, 1)
    # log(w / h) against the middle of two buckets' logarithms, in squares: the same on every machine.
    borders = [(a[1] * b[1]) / (a[0] * b[0]) for a, b in itertools.pairwise(sizes)]
    numbers = np.searchsorted(np.array(borders), (w * w) / (h * h))
    if max_upscale is not None:
        wanted = np.array(sizes, dtype=np.int64)[numbers]
        known &= (wanted[:, 0] <= max_upscale * h) & (wanted[:, 1] <= max_upscale * w)
    return np.where(known, numbers, NO_BUCKET)


def _edges(shown: Crop) -> tuple[int, int, int, int]:
    """Left, top, right, bottom, as Pillow orders them."""
    return shown.left, shown.top, shown.left + shown.width, shown.top + shown.height
