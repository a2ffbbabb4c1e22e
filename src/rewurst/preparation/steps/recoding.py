"""Read and check a picture, shrink it if asked for, and settle its facts.

The result depends only on the picture and the options.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ... import UsageError
from ...datamodules.imaging.captions import captions_in, captions_in_text
from ...datamodules.imaging.corrupt import CorruptImages
from ...datamodules.imaging.decoding import decode, read_header
from ...datamodules.imaging.facts import facts_of
from ...datamodules.imaging.geometry import Crop, resample, size_to_decode
from ...datamodules.imaging.header import MAX_PIXELS, DecodeError
from ...datamodules.storage.url import Place, Url
from ..sources.pictures import Drawing, Picture
from ..sources.pictures.shapes import draw
from ..writing.image_writer import ImageSample

FORMATS = ("jpg", "png", "webp")
_SUFFIXES = {"jpeg": "jpg", "tiff": "tif"}  # of formats, where it is another word


@dataclass(frozen=True)
class Recoding:
    """How pictures are stored.

    Args:
        image_size: Shortest side in pixels to shrink larger pictures to; the side of drawn ones (default: 64).
        format: Format to encode all pictures in: jpg, png or webp (default: files stay as they are, byte for byte).
        quality: Quality of JPEG and WebP, 1 to 100.
        max_pixels: Number of pixels above which a picture counts as corrupt.
    """

    image_size: int | None = None
    format: str | None = None
    quality: int = 95
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise UsageError(f"image_size is {self.image_size}, expected 1 or more")
        if self.format not in (None, *FORMATS):
            raise UsageError(f"format is {self.format!r}, expected {' or '.join(FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise UsageError(f"quality is {self.quality}, expected 1 to 100")


class Fault(NamedTuple):
    """A picture that cannot be used; ``kind`` is ``corrupt`` or ``caption``."""

    kind: str
    name: str
    reason: str


def sample_of(picture: Picture, recoding: Recoding) -> ImageSample | Fault:
    """Return the sample that a picture becomes, or why there is none."""
    try:
        captions = _captions(picture.caption)
        values = _values(picture.values)
        if isinstance(values, list):  # nothing but captions
            captions, values = captions or captions_in(values), {}
        for field in () if captions else picture.caption_fields:
            captions = captions or captions_in(values.get(field))
        if not captions:
            return Fault("caption", picture.name, "no caption")
        if isinstance(picture.image, Drawing):
            drawing = picture.image
            suffix = recoding.format or "png"
            data = _encode(draw(*drawing), suffix, recoding.quality)
            decides = data
        else:
            decides = picture.image if isinstance(picture.image, bytes) else _read(picture.image)
            suffix, data, original = _recode(decides, recoding)
            if original is not None:
                values = {"original_width": original[1], "original_height": original[0]} | values
        members = {suffix: data, "txt": "\n".join(captions).encode()}
        if values:
            members["json"] = json.dumps(values, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")
        share = int.from_bytes(hashlib.blake2b(decides, digest_size=8).digest(), "big") / 2**64
        return ImageSample(members, facts_of(members, max_pixels=recoding.max_pixels), share, picture.side)
    except DecodeError as error:
        return Fault("corrupt", picture.name, str(error))


def side_of(sample: ImageSample, held_out: float) -> str:
    """Where a sample goes: as its source says, or ``val`` for a share of ``held_out`` and ``train`` for the others."""
    return sample.side or ("val" if sample.draw < held_out else "train")


def _recode(data: bytes, recoding: Recoding) -> tuple[str, bytes, tuple[int, int] | None]:
    """Suffix and content of what is stored, and the size before where that was larger."""
    header = read_header(data, recoding.max_pixels)
    size = header.height, header.width
    suffix = _SUFFIXES.get(header.format, header.format)
    smaller = recoding.image_size is not None and min(size) > recoding.image_size
    if not smaller and recoding.format in (None, suffix):
        decode(data, (1, 1), recoding.max_pixels)  # reads all of it, and says whether it is whole
        return suffix, data, None
    target = _target(size, recoding.image_size) if smaller else size
    whole = Crop(0, 0, *size)
    pixels = decode(data, size_to_decode(size, whole, target), recoding.max_pixels)
    suffix = recoding.format or (suffix if suffix in FORMATS else "png")
    return suffix, _encode(resample(pixels, size, whole, target), suffix, recoding.quality), size if smaller else None


def _target(size: tuple[int, int], shortest: int | None) -> tuple[int, int]:
    assert shortest is not None
    by = shortest / min(size)
    return max(shortest, round(size[0] * by)), max(shortest, round(size[1] * by))


def _encode(pixels: NDArray[np.uint8], suffix: str, quality: int) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if suffix == "jpg":
        image.save(file, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    elif suffix == "webp":
        image.save(file, "WEBP", quality=quality)
    else:
        image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _captions(caption: Place | str | list[str] | None) -> list[str]:
    if not isinstance(caption, Path | Url):
        return captions_in(caption)
    try:
        return captions_in_text(_read(caption))
    except DecodeError as error:
        reason = str(error)
        raise DecodeError(reason if str(caption) in reason else f"{caption}: {reason}") from None


def _values(values: Place | dict[str, Any]) -> dict[str, Any] | list[str]:
    if isinstance(values, dict):
        return values
    try:
        found = json.loads(_read(values))
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"{values} is not valid JSON ({str(error).splitlines()[0]})") from None
    if isinstance(found, list) and found and all(isinstance(text, str) for text in found):
        return found
    if not isinstance(found, dict):
        raise DecodeError(f"{values} holds a {type(found).__name__}, expected an object")
    return found


def _read(path: Place) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DecodeError(f"{path} cannot be read ({error.strerror or error})") from None


ENOUGH = 1000  # pictures after which too many corrupt ones end the preparation early


class Faults:
    """Pictures that could not be used: counted, the first ones of each kind remembered.

    Args:
        max_corrupt: Share of the pictures that may be corrupt.
        skip_without_caption: Whether pictures without a caption are left out; otherwise they are refused.
    """

    def __init__(self, max_corrupt: float, skip_without_caption: bool) -> None:
        self._corrupt = CorruptImages(max_corrupt, ENOUGH)
        self._bare = CorruptImages(float(skip_without_caption))
        self.several = 0  # pictures with several captions, which is not a fault

    def count(self, seen: int, found: Sequence[Fault], final: bool = False) -> None:
        """Count pictures, and those among them that cannot be used.

        Raises:
            UsageError: One has no caption, or too many are corrupt.
        """
        bare = [fault for fault in found if fault.kind == "caption"]
        if bare and not self._bare.max_corrupt:
            raise without_caption(bare[0])
        self._bare.add(seen, [fault.name for fault in bare])
        self._corrupt.add(seen, [f"{name} ({reason})" for kind, name, reason in found if kind == "corrupt"], final)

    def remarks(self) -> Iterator[str]:
        """Yield one line for each kind of fault."""
        for kind, what in ((self._corrupt, "corrupt pictures"), (self._bare, "pictures without a caption")):
            if kind.count:
                yield f"{kind.count} {what} left out, the first: {kind.named()}"
        if self.several:
            yield f"{self.several} pictures have several captions, of which training draws one each time"


def without_caption(fault: Fault) -> UsageError:
    """Return the error for a picture that has no caption."""
    return UsageError(f"{fault.name}: no caption; add one, or leave such pictures out: --skip_without_caption")
