"""Headers of image files: format, size and orientation, without decoding.

Decoders are not used because some allocate the whole image when they open a file. The code follows the formats'
specifications: JPEG (ITU T.81, annex B), PNG, GIF89a, WebP (RFC 9649), EXIF 2.3. Pillow reads the headers of BMP, TIFF
and AVIF, because it does not allocate pixels when it opens them.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import AvifImagePlugin, BmpImagePlugin, ImageFile, TiffImagePlugin

from .orientation import ORIENTATION, exif_orientation, from_hexadecimal

MAX_PIXELS = 2**27  # 134 million, 400 MB decoded; photographs have up to 108 million, the paper's images 17
# A progressive JPEG is decoded once per scan, so a few KB could take minutes. Encoders write about ten scans.
MAX_SCANS = 100

_MAGIC = {
    "jpeg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "gif": (b"GIF87a", b"GIF89a"),
    "webp": (b"RIFF",),
    "bmp": (b"BM",),
    "tiff": (b"II*\0", b"MM\0*"),
}
_BY_PILLOW: dict[str, type[ImageFile.ImageFile]] = {
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
}
_TEXT_BYTES = 1 << 20  # limit of a PNG's decompressed text; Pillow refuses more
_NO_FRAME = {0xC4, 0xC8, 0xCC}  # DHT, JPG, DAC, whose codes are among the start-of-frame markers
_XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"
_WANTED = (b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"EXIF", b"XMP ")  # chunks that may have the orientation
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_SCAN = 0xDA
_ALONE = {0x00, 0x01, *range(0xD0, 0xDA)}  # not a marker, or one without a segment


class DecodeError(ValueError):
    """An image that cannot be decoded, or must not be; the message is the reason."""


class Header(NamedTuple):
    """Properties of an image that are known without decoding it.

    Attributes:
        format: Name of the format: ``jpeg``, ``png``, ``gif``, ``webp``, ``bmp``, ``tiff`` or ``avif``.
        height: Height in pixels, upright, after applying the EXIF orientation.
        width: Width in pixels, upright.
        orientation: EXIF orientation, 1 to 8; from 5 on the stored image is rotated by 90 degrees.
        channels: Number of channels of a JPEG, else 0.
    """

    format: str
    height: int
    width: int
    orientation: int = 1
    channels: int = 0

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width before the orientation is applied."""
        return (self.width, self.height) if self.orientation > 4 else (self.height, self.width)


class _Found(NamedTuple):
    width: int
    height: int
    orientation: int = 1
    channels: int = 0


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Return format, size and orientation of an image file.

    Args:
        data: Content of the file.
        max_pixels: Largest number of pixels to accept.

    Raises:
        DecodeError: The format is unknown, the header is cut off or invalid, or there are too many pixels.
    """
    name = format_of(data)
    try:
        found = _READERS[name](data)
    except IndexError:
        raise DecodeError(f"the {name} header is cut off") from None
    if not found.width or not found.height:
        raise DecodeError(f"the {name} header says {found.width} x {found.height} pixels")
    if found.width * found.height > max_pixels:
        raise DecodeError(f"{found.width} x {found.height} pixels are more than {max_pixels}")
    width, height = (found.height, found.width) if found.orientation > 4 else (found.width, found.height)
    return Header(name, height, width, found.orientation, found.channels)


def format_of(data: bytes) -> str:
    """Return ``jpeg``, ``png``, ``gif``, ``webp``, ``bmp``, ``tiff`` or ``avif`` by the first bytes, not the file name.

    Raises:
        DecodeError: The format is unknown.
    """
    for name, magic in _MAGIC.items():
        if data.startswith(magic) and (name != "webp" or data[8:12] == b"WEBP"):
            return name
    brands = data[8 : int.from_bytes(data[:4], "big")][:256] if data[4:8] == b"ftyp" else b""
    if b"avif" in brands or b"avis" in brands:
        return "avif"
    start = f"begins with {data[:4].hex(' ')}" if data else "empty"
    heic = any(brand in brands for brand in (b"heic", b"heix", b"mif1"))
    other = ": it is HEIC; convert it to JPEG" if heic else ""
    raise DecodeError(f"not a JPEG, PNG, WebP or GIF ({start}){other}")


def _integer(data: bytes, offset: int, size: int, order: str = "big") -> int:
    part = data[offset : offset + size]
    if len(part) < size:
        raise IndexError
    return int.from_bytes(part, "little" if order == "little" else "big")


def _jpeg(data: bytes) -> _Found:
    exif, xmp, frame, progressive = b"", b"", _Found(0, 0), False
    for marker, at, end in _segments(data):
        if marker == 0xE1 and data[at : at + 6] == b"Exif\0\0":
            exif = exif or data[at + 6 : end]
        elif marker == 0xE1 and data[at:end].startswith(_XMP_MARK):
            xmp = data[at + len(_XMP_MARK) : end]
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            frame = _Found(_integer(data, at + 3, 2), _integer(data, at + 1, 2), channels=data[at + 5])
            progressive = marker in _PROGRESSIVE
        elif marker == _SCAN:
            # A sequential image whose first scan contains all channels ends with it.
            if (progressive or data[at] < frame.channels) and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
                raise DecodeError(f"{scans} scans are more than {MAX_SCANS}")
            return frame._replace(orientation=exif_orientation(exif, xmp))
    raise IndexError


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the markers of a JPEG up to its first scan, with the start and end of their content."""
    position = 2
    while (position := data.find(b"\xff", position)) >= 0:
        while data[position] == 0xFF:  # any number of fill bytes may precede a marker
            position += 1
        marker = data[position]
        position += 1
        if marker not in _ALONE:
            end = position + max(2, _integer(data, position, 2))
            yield marker, position + 2, end
            position = end


def _png(data: bytes) -> _Found:
    if data[12:16] != b"IHDR":
        raise DecodeError("the png header does not begin with IHDR")
    found = dict[str, bytes]()
    for name, body in _chunks(data, 8, "big"):
        if name == b"eXIf":
            found["exif"] = body
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            key, text = _png_text(name, body)
            found[key] = text
    exif = found["exif"] if "exif" in found else from_hexadecimal(found.get("Raw profile type exif", b""))
    orientation = exif_orientation(exif, found.get("XML:com.adobe.xmp", b""))
    return _Found(_integer(data, 16, 4), _integer(data, 20, 4), orientation)


def _png_text(name: bytes, body: bytes) -> tuple[str, bytes]:
    """Return the keyword and the text of one of the three text chunks; the text is empty if it is broken."""
    key, _, text = body.partition(b"\0")
    packed = name == b"zTXt"
    if packed:
        text = text[1:]
    elif name == b"iTXt":
        packed, text = text[:1] not in (b"", b"\0"), text[2:].split(b"\0", 2)[-1]
    try:
        text = zlib.decompressobj().decompress(text, _TEXT_BYTES) if packed else text
    except zlib.error:
        text = b""
    return key.decode("latin-1"), text


def _gif(data: bytes) -> _Found:
    return _Found(_integer(data, 6, 2, "little"), _integer(data, 8, 2, "little"))


def _webp(data: bytes) -> _Found:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + _integer(data, offset, 3, "little") for offset in (24, 27))
        found = {name: body for name, body in _chunks(data, 12, "little") if body}
        return _Found(width, height, exif_orientation(found.get(b"EXIF", b""), found.get(b"XMP ", b"")))
    if kind == b"VP8 ":  # lossy: a frame tag of 3 bytes, a start code of 3, then two sizes of 14 bits
        return _Found(_integer(data, 26, 2, "little") & 0x3FFF, _integer(data, 28, 2, "little") & 0x3FFF)
    if kind == b"VP8L":
        bits = _integer(data, 21, 4, "little")
        return _Found(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    raise DecodeError(f"the webp header begins with {kind!r}")


def _chunks(data: bytes, position: int, order: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield names and bodies of chunks: PNG (big: length first, checksum last) or RIFF (little: name first, padded)."""
    while position + 8 <= len(data):
        if order == "big":
            length, name, after = _integer(data, position, 4), data[position + 4 : position + 8], 4
        else:
            name, length = data[position : position + 4], _integer(data, position + 4, 4, order)
            after = length % 2
        # Only chunks that may be needed are copied, not the pixels.
        yield name, data[position + 8 : position + 8 + length] if name in _WANTED else b""
        position += 8 + length + after


def _by_pillow(data: bytes) -> _Found:
    name = format_of(data)
    try:
        with _BY_PILLOW[name](io.BytesIO(data)) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
            orientation = orientation if orientation in range(1, 9) else 1
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # `size` is upright for some of the orientations
                return _Found(image.tag_v2[256], image.tag_v2[257], orientation)
            return _Found(*image.size, orientation)
    except Exception as error:  # corrupt headers cause many kinds of errors
        raise DecodeError(f"{name}: {str(error).splitlines()[0] if str(error) else repr(error)}") from None


_READERS = {"jpeg": _jpeg, "png": _png, "gif": _gif, "webp": _webp} | dict.fromkeys(_BY_PILLOW, _by_pillow)
