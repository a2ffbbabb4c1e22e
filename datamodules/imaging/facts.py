"""Facts of a sample, stored when its shard is indexed: sizes, caption, scores of the large public datasets.

A sample is all members of a WebDataset tar with one key: an image, ``.txt``, ``.json``. Images are not decoded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ...hints import closest
from .captions import captions_in, captions_in_text
from .header import MAX_PIXELS, DecodeError, read_header

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "jfif", "bmp", "tif", "tiff", "avif")

# Keys of .json under which the datasets store a score, in any case; the first with a number counts. LAION-5B, also via
# img2dataset: pwatermark, punsafe; LAION-Aesthetics: AESTHETIC_SCORE, aesthetic; COYO: the longer ones.
_WATERMARK = ("pwatermark", "watermark_score", "watermark")
_AESTHETIC = ("aesthetic", "aesthetic_score", "aesthetics_score", "aesthetic_score_laion_v2")
_UNSAFE = ("punsafe", "unsafe", "nsfw_score_opennsfw2")
# Sizes before img2dataset; LAION's tables use capitals (lower-case ``width`` is that of the stored image).
_ORIGINAL = (("original_width", "original_height"), ("WIDTH", "HEIGHT"))

FACTS_DTYPE = np.dtype(
    [
        ("width", "<i4"),
        ("height", "<i4"),
        ("original_width", "<i4"),
        ("original_height", "<i4"),
        ("caption_length", "<i4"),
        ("watermark", "<f4"),
        ("aesthetic", "<f4"),
        ("unsafe", "<f4"),
    ]
)


class Facts(NamedTuple):
    """One row of ``FACTS_DTYPE``.

    Attributes:
        width: Width of the stored image in pixels, upright; 0 if it cannot be read.
        height: Height of the stored image, likewise.
        original_width: Width before the dataset's authors resized it, from its .json; 0 if unknown.
        original_height: Height before resizing, likewise.
        caption_length: Length of the (shortest) caption in characters; -1 if there is none.
        watermark: Probability of a watermark, NaN if unknown.
        aesthetic: Predicted aesthetic score, 1 to 10, NaN if unknown.
        unsafe: Probability of being unsafe, NaN if unknown.
    """

    width: int = 0
    height: int = 0
    original_width: int = 0
    original_height: int = 0
    caption_length: int = -1
    watermark: float = math.nan
    aesthetic: float = math.nan
    unsafe: float = math.nan


UNREADABLE = Facts()
_LARGEST = float(np.finfo(np.float32).max)  # scores are stored as float32


def facts_of(
    members: Mapping[str, bytes],
    caption_key: str | None = None,
    max_pixels: int = MAX_PIXELS,
    image_member: str | None = None,
    caption_member: str | None = None,
) -> Facts:
    """Return the facts of one sample.

    Args:
        members: Contents by suffix, such as ``{"jpg": ..., "txt": ..., "json": ...}``.
        caption_key: Key of the caption in the .json (default: the caption is the .txt).
        max_pixels: Largest number of pixels to accept.
        image_member: Suffix of the image (default: the first of ``IMAGE_SUFFIXES``).
        caption_member: Suffix of the caption (default: txt, or json with a key).

    Raises:
        DecodeError: There is no image, its header is invalid or has too many pixels, the .json is invalid, or the
            caption is not text.
    """
    header = read_header(members[image_suffix(members, image_member)], max_pixels)
    values, captions = json_of(members), captions_of(members, caption_key, caption_member)
    lowered = {key.lower(): value for key, value in values.items()}
    original = next((found for keys in _ORIGINAL if all(found := [_count(values.get(key)) for key in keys])), [0, 0])
    return Facts(
        header.width,
        header.height,
        original[0],
        original[1],
        min(map(len, captions), default=-1),
        _score(lowered, _WATERMARK),
        _score(lowered, _AESTHETIC),
        _score(lowered, _UNSAFE),
    )


def image_suffix(members: Mapping[str, Any], named: str | None = None) -> str:
    """Return the suffix of a sample's image, the first of ``IMAGE_SUFFIXES`` if it has several.

    Args:
        members: Contents by suffix.
        named: Suffix of the image, if known.

    Raises:
        DecodeError: There is no image.
    """
    lowered: dict[str, str] = {}
    for suffix in members:
        lowered.setdefault(suffix.lower(), suffix)
    for suffix in [named] if named else IMAGE_SUFFIXES:
        if suffix in lowered:
            return lowered[suffix]
    what = f"no .{named}" if named else "no image"
    raise DecodeError(f"{what}, only {', '.join('.' + suffix for suffix in members) or 'nothing'}")


def captions_of(
    members: Mapping[str, bytes], caption_key: str | None = None, caption_member: str | None = None
) -> list[str]:
    """Return the captions of a sample: lines of the .txt, or the text or list of texts under a key of the .json.

    Args:
        members: Contents by suffix.
        caption_key: Key of the captions in the .json (default: the captions are in the .txt).
        caption_member: Suffix of the member with the captions (default: txt, or json with a key).

    Raises:
        DecodeError: The .json is invalid, or the .txt is not text.
    """
    if caption_key is not None:
        return captions_in(json_of(members, caption_member or "json").get(caption_key))
    name = caption_member or "txt"
    try:
        return captions_in_text(members[name]) if name in members else []
    except DecodeError as error:
        raise DecodeError(f".{name}: {error}") from None


def caption_of(members: Mapping[str, bytes], caption_key: str | None = None) -> str | None:
    """Return the first caption of a sample, or None if it has none; see :func:`captions_of`."""
    return next(iter(captions_of(members, caption_key)), None)


def no_caption(
    where: str, caption_key: str | None, members: Mapping[str, bytes], caption_member: str | None = None
) -> UsageError:
    """Build the error for samples without captions; ``members`` is one of them, to name what it has instead."""
    try:
        keys = [key for key, value in json_of(members).items() if isinstance(value, str | list)]
    except DecodeError:
        keys = []
    texts = f"caption_key can be one of: {', '.join(keys)}" if keys else "no .json has text either"
    if caption_key is None:
        suffixes = ", ".join("." + suffix for suffix in members)
        return UsageError(
            f"{where}: no sample has a caption (.{caption_member or 'txt'}), they have {suffixes}; {texts}"
        )
    near = closest(caption_key, keys)
    return UsageError(f"{where}: caption_key is {caption_key!r}, which no sample has{near or '; ' + texts}")


def facts_array(facts: Sequence[Facts]) -> NDArray[Any]:
    """Return facts as rows of ``FACTS_DTYPE``, shape (n,)."""
    return np.array(list(facts), dtype=FACTS_DTYPE)


def json_of(members: Mapping[str, bytes], name: str = "json") -> dict[str, Any]:
    """Return the object in a sample's .json, or an empty one without a .json.

    Raises:
        DecodeError: The content is not a JSON object.
    """
    if name not in members:
        return {}
    try:
        values = json.loads(members[name])
    except (ValueError, RecursionError) as error:
        raise DecodeError(f".{name} is not valid JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise DecodeError(f".{name} contains a {type(values).__name__}, expected an object")
    return values


def _score(values: Mapping[str, Any], keys: Sequence[str]) -> float:
    return next((number for key in keys if not math.isnan(number := _number(values.get(key)))), math.nan)


def _count(value: Any) -> int:
    number = _number(value)
    return int(number) if 0 < number < 2**31 else 0


def _number(value: Any) -> float:
    """Return a finite number, even if it is stored as text; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if abs(number) <= _LARGEST else math.nan
