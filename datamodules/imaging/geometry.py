"""Crops and sizes of images, as pure functions of sizes and seeds.

Sizes are (height, width); a crop is in pixels of the stored image, upright. The image is resized to cover the target
and the rest is cropped, both in one bicubic resampling with antialiasing.
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

# A JPEG is reduced to at least twice the target size, then resampled: 50 dB from resampling the whole image.
DECODING_GAP = 2.0
NO_BUCKET = -1


class Crop(NamedTuple):
    """A rectangle in pixels of the stored image."""

    top: int
    left: int
    height: int
    width: int


def uniform(seed: int, purpose: str, count: int) -> list[float]:
    """Return numbers in [0, 1) that depend only on a sample's seed and their purpose."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}".encode(), digest_size=8 * count).digest()
    return [(int.from_bytes(digest[i : i + 8], "little") >> 11) / 2**53 for i in range(0, len(digest), 8)]


def crop(size: Size, target: Size, seed: int | None = None, covered: Size | None = None) -> Crop:
    """Return the part of an image that remains if it is resized to cover ``covered`` and cropped to ``target``.

    Args:
        size: Size of the stored image.
        target: Size of the crop.
        seed: Seed of the sample, for a random position; without a seed the crop is centered.
        covered: Size that the resized image covers, at least ``target`` (default: ``target``, so that only the
            difference of aspect ratios is cropped). Stage A trains on crops of 128 pixels of images resized to 256.
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
    """Return the size to decode an image at, so that no detail is lost when the crop is resized to ``target``."""
    height = DECODING_GAP * target[0] * size[0] / shown.height
    width = DECODING_GAP * target[1] * size[1] / shown.width
    return min(size[0], int(np.ceil(height))), min(size[1], int(np.ceil(width)))


def resample(pixels: Pixels, size: Size, shown: Crop, target: Size) -> Pixels:
    """Crop and resize at once.

    Args:
        pixels: Decoded image, shape (h, w, 3), as stored or reduced by 2, 4 or 8 in decoding.
        size: Size of the stored image.
        shown: Crop to keep.
        target: Size of the result.

    Returns:
        The pixels, shape (*target, 3).
    """
    reduction = round(size[0] / pixels.shape[0])  # rounds to the factor, because reduced sides are rounded up
    box = tuple(side / reduction for side in _edges(shown))
    if any(side % reduction for side in _edges(shown)):  # only Pillow crops between pixels, but several times slower
        image = Image.fromarray(pixels)
        return np.asarray(image.resize(target[::-1], Image.Resampling.BICUBIC, box=box))
    left, top, right, bottom = map(int, box)
    part = pixels[top:bottom, left:right]
    if part.shape[:2] == target:
        return part
    import torch  # not at the top, because preparing shards without resizing does not need it

    channels = torch.from_numpy(np.array(part)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(channels, target, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def buckets(image_size: int, multiple: int, max_aspect: float = 2.0) -> list[Size]:
    """Return sizes with about the area of a square of ``image_size``, from tall to wide, including the square.

    As for SDXL and NovelAI, sides are multiples, the area is at most the square's (which bounds memory), and no bucket
    fits into another.

    Args:
        image_size: Side length of the square.
        multiple: Number of which all sides are multiples.
        max_aspect: Largest ratio of the longer to the shorter side.

    Raises:
        UsageError: ``image_size`` is not a multiple of ``multiple``, or ``max_aspect`` is below 1.
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
    """Return the bucket whose aspect ratio is nearest to each image's, on a logarithmic scale.

    Args:
        heights: Heights of the images, shape (n,); 0 if unknown.
        widths: Widths of the images, likewise.
        sizes: Sizes of the buckets, from tall to wide, as ``buckets`` returns them.
        max_upscale: Largest factor of enlargement; images that need more have no bucket, and 1 means no enlargement.

    Returns:
        Indices of the buckets, shape (n,), or ``NO_BUCKET``.
    """
    h, w = heights.astype(np.int64), widths.astype(np.int64)
    known = (h > 0) & (w > 0)
    h, w = np.where(known, h, 1), np.where(known, w, 1)
    # Compares log(w / h) with the midpoint of two buckets' logarithms, in squares, to be the same on every machine.
    borders = [(a[1] * b[1]) / (a[0] * b[0]) for a, b in itertools.pairwise(sizes)]
    numbers = np.searchsorted(np.array(borders), (w * w) / (h * h))
    if max_upscale is not None:
        wanted = np.array(sizes, dtype=np.int64)[numbers]
        known &= (wanted[:, 0] <= max_upscale * h) & (wanted[:, 1] <= max_upscale * w)
    return np.where(known, numbers, NO_BUCKET)


def _edges(shown: Crop) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom, in Pillow's order."""
    return shown.left, shown.top, shown.left + shown.width, shown.top + shown.height
