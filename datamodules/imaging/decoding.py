"""Safe decoding of image files to upright RGB pixels; files with too many pixels are not decoded.

1. ``header`` reads the header and checks it against ``max_pixels`` before memory is allocated. A decoder that finds a
   different size from the header's is stopped before it decodes.
2. JPEGs that are needed much smaller are decoded at a half, a quarter or an eighth of their size, by leaving out high
   frequencies of their cosine transform, with simplejpeg if installed, otherwise with Pillow.
3. All files become 8-bit RGB: transparency over white, 16 bits rounded to 8, CMYK with Pillow's conversion. The EXIF
   orientation is applied; color profiles are not.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ... import UsageError
from .header import MAX_PIXELS, DecodeError, Header, read_header

__all__ = ["MAX_PIXELS", "DecodeError", "Header", "decode", "read_header", "reduction_for"]

Pixels = NDArray[np.uint8]

try:
    _simplejpeg: Any = importlib.import_module("simplejpeg")
except ImportError:
    _simplejpeg = None

# Opened by class, because ``Image.open`` would try other formats, and has its own, process-wide limit of pixels.
_OPENERS: dict[str, type[ImageFile.ImageFile]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
}
_SMALLEST_SIDE = 16  # of a reduced image; the size of a smaller one does not determine its reduction


def decode(
    data: bytes,
    at_least: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    simplejpeg: bool = _simplejpeg is not None,
) -> Pixels:
    """Decode a JPEG, PNG, WebP, GIF (its first frame), BMP, TIFF (its first page) or AVIF.

    Args:
        data: Content of the file.
        at_least: Sufficient height and width: a JPEG may be reduced by 2, 4 or 8, but not below this size. Its size is
            then divided by the reduction and rounded up.
        max_pixels: Largest number of pixels to accept.
        simplejpeg: Whether to decode JPEGs with simplejpeg, which is faster and returns the same pixels as Pillow,
            because both contain libjpeg-turbo.

    Returns:
        Upright RGB pixels, shape (height, width, 3).

    Raises:
        DecodeError: The file is truncated, corrupt, too large, or of a different format.
    """
    header = read_header(data, max_pixels)
    reduction = reduction_for(header, at_least)
    pixels = None
    if simplejpeg and header.format == "jpeg" and header.channels in (1, 3):
        pixels = _with_simplejpeg(data, header, reduction)
    if pixels is None:
        pixels = _with_pillow(data, header, reduction)
    upright = pixels if header.format == "tiff" else _upright(pixels, header.orientation)  # Pillow rotates TIFFs itself
    return np.ascontiguousarray(upright)


def read_image(path: str | Path) -> Pixels:
    """Read an image file in the same way as training.

    Returns:
        Upright RGB pixels, shape (height, width, 3).

    Raises:
        UsageError: The file cannot be read or decoded.
    """
    try:
        return decode(Path(path).read_bytes())
    except (OSError, DecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{path} cannot be read as an image ({reason}): give a .png, .jpg, .webp or .gif file"
        ) from None


def reduction_for(header: Header, at_least: tuple[int, int] | None) -> int:
    """Return the factor by which an image is reduced in decoding: 8, 4, 2 or 1."""
    if at_least is None or header.format != "jpeg":
        return 1
    height, width = (max(side, _SMALLEST_SIDE) for side in at_least)
    fitting = (by for by in (8, 4, 2) if -(-header.height // by) >= height and -(-header.width // by) >= width)
    return next(fitting, 1)


def _with_simplejpeg(data: bytes, header: Header, reduction: int) -> Pixels | None:
    """Return the pixels as stored, or None at any fault, as Pillow then decides whether it is an error."""
    height, width = (-(-side // reduction) for side in header.stored_size)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    try:
        _simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=reduction, buffer=pixels)
    except (ValueError, RuntimeError):
        return None
    return pixels


def _with_pillow(data: bytes, header: Header, reduction: int) -> Pixels:
    """Return the pixels as stored."""
    size = header.stored_size[::-1]
    try:
        with _OPENERS[header.format](io.BytesIO(data)) as image:
            if image.size != size and not (header.format == "tiff" and image.size == size[::-1]):
                raise DecodeError(f"the image is {image.size[0]} x {image.size[1]}, which differs from its header")
            if reduction > 1:
                image.draft(image.mode, (size[0] // reduction, size[1] // reduction))
            _refuse_unscaled(image)
            image.load()
            return _to_rgb(image)
    except DecodeError:
        raise
    except Exception as error:  # corrupt files cause many kinds of errors: OSError, SyntaxError, struct.error
        raise DecodeError(f"{header.format}: {str(error).splitlines()[0] if str(error) else repr(error)}") from None


def _refuse_unscaled(image: Image.Image) -> None:
    """Check that a TIFF's numbers define black and white, and that Pillow reads them as intended."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    bits = image.tag_v2.get(258, (1,))
    if image.mode in ("I", "F") or (image.mode.startswith("I;16") and (bits != (16,) or image.tag_v2.get(262) == 0)):
        raise DecodeError(
            f"a tiff of mode {image.mode} with {bits[0]} bits per channel: convert it to 8 or 16 unsigned bits, 0 black"
        )


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):  # 16-bit gray
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey = np.where(grey == transparent, 65535, grey)  # over white
        return ((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None].repeat(3, axis=-1)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        return np.asarray(white)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo the rotation and mirroring of an EXIF orientation from 1 to 8."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
