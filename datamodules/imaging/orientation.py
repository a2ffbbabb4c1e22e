"""Orientation of a stored image, from EXIF, from the text chunk that older PNG writers use for it, or from XMP.

The rules are those of Pillow's ``ImageOps.exif_transpose``: EXIF counts if it has the tag, with any numeric type; XMP
counts only if EXIF does not have it.
"""

from __future__ import annotations

import re
import struct

ORIENTATION = 0x0112
UPRIGHT = 1
# Size in bytes of each TIFF type, and the format to unpack numbers; a rational is two of them.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_NUMBERS = {3: "H", 4: "L", 5: "LL", 6: "b", 8: "h", 9: "l", 10: "ll", 11: "f", 12: "d", 13: "L", 16: "Q"}
_INLINE = 4  # largest size in bytes of a value stored in the entry itself
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_EXIF_MARK = re.compile(rb"^(?:Exif\0\0){1,2}")


def exif_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Return the orientation of the stored image as in EXIF, 1 to 8.

    Args:
        exif: TIFF structure of the EXIF data, empty if there is none.
        xmp: XMP packet, empty if there is none.
    """
    found = _in_exif(_EXIF_MARK.sub(b"", exif))
    if found is None and (match := _XMP.search(xmp)):
        found = float(match[1])
    return int(found) if found is not None and found in range(1, 9) else UPRIGHT


def _in_exif(exif: bytes) -> float | None:
    """Return the value of the tag, 0 if it is not a number, or None if there is no such tag."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (entries,) = struct.unpack_from(f"{order}L", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, entries)
        for entry in range(entries + 2, entries + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHL", exif, entry)
            size = values * _SIZES.get(kind, 0)
            if tag == ORIENTATION and size:
                at = entry + 8 if size <= _INLINE else struct.unpack_from(f"{order}L", exif, entry + 8)[0]
                if at + size <= len(exif):
                    return _number(exif, at, kind, order)
    except struct.error:
        pass  # broken EXIF is common, and the image is still usable
    return None


def _number(exif: bytes, at: int, kind: int, order: str) -> float:
    if kind not in _NUMBERS:
        return 0
    number, *below = struct.unpack_from(order + _NUMBERS[kind], exif, at)
    return float(number / below[0] if below and below[0] else 0 if below else number)


def from_hexadecimal(text: bytes) -> bytes:
    """Return the EXIF data of the PNG text ``Raw profile type exif``: three lines, then hexadecimal digits."""
    try:
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""
