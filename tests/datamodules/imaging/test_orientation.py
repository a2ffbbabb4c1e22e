"""Orientation in every form and format that Pillow reads gives the pictures of its ``exif_transpose``."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from rewurst.datamodules.imaging.decoding import DecodeError, decode, read_header
from rewurst.datamodules.imaging.orientation import exif_orientation

PIXELS = np.random.default_rng(0).integers(0, 256, (34, 20, 3), dtype=np.uint8)
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description {}/></x:xmpmeta>'
KINDS: dict[str, str] = {"SHORT": "H", "LONG": "L", "SBYTE": "b", "SSHORT": "h", "SLONG": "l", "FLOAT": "f"}
TYPES = {"SHORT": 3, "LONG": 4, "SBYTE": 6, "SSHORT": 8, "SLONG": 9, "FLOAT": 11}


def tiff(orientation: float, kind: str = "SHORT", order: str = "<") -> bytes:
    value = struct.pack(order + KINDS[kind], orientation if kind == "FLOAT" else int(orientation)).ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHL", 0x0112, TYPES[kind], 1) + value
    return mark + struct.pack(f"{order}LH", 8, 1) + entry + bytes(4)


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if kind == "PNG" and "xmp" in options:  # Pillow writes none by itself
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", options.pop("xmp").decode())
    Image.fromarray(PIXELS).save(file, kind, **options)
    return file.getvalue()


def png_text(key: str, text: str, form: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    if form == "iTXt":
        info.add_itxt(key, text)
    elif form == "zipped iTXt":
        info.add_itxt(key, text, zip=True)
    else:
        info.add_text(key, text, zip=form == "zTXt")
    return saved("PNG", pnginfo=info)


def in_exif(image: str, orientation: int, **form: Any) -> bytes:
    return saved(image, exif=b"Exif\0\0" + tiff(orientation, **form))


def in_xmp(image: str, orientation: int) -> bytes:
    return saved(image, xmp=XMP.format(f'tiff:Orientation="{orientation}"').encode())


def profile(orientation: int, form: str) -> bytes:
    content = (b"Exif\0\0" + tiff(orientation)).hex()
    lines = "\n".join(content[at : at + 72] for at in range(0, len(content), 72))
    return png_text("Raw profile type exif", f"\nexif\n{len(content) // 2:8}\n{lines}\n", form)


def in_tiff(orientation: int, **options: Any) -> bytes:
    return saved("TIFF", tiffinfo={0x0112: orientation}, **options)


FORMS: dict[str, Any] = {
    **{f"{kind} {form}": (in_exif, kind, {"kind": form}) for kind in ("JPEG", "PNG", "WEBP") for form in KINDS},
    **{f"{kind} big endian": (in_exif, kind, {"order": ">"}) for kind in ("JPEG", "PNG", "WEBP", "AVIF")},
    **{f"{kind} XMP": (in_xmp, kind, {}) for kind in ("JPEG", "PNG", "WEBP", "AVIF")},
}


def check(data: bytes, orientation: int) -> None:
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    header = read_header(data)
    assert (header.height, header.width, header.orientation) == (*expected.shape[:2], orientation)
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", FORMS)
def test_orientation_is_read_in_every_form(form: str, orientation: int) -> None:
    make, image, options = FORMS[form]
    check(make(image, orientation, **options), orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["tEXt", "zTXt", "iTXt", "zipped iTXt"])
def test_text_chunks_of_png_are_read(form: str, orientation: int) -> None:
    check(profile(orientation, form), orientation)
    check(png_text("XML:com.adobe.xmp", XMP.format(f'tiff:Orientation="{orientation}"'), form), orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_is_turned_once(orientation: int, compression: str | None) -> None:
    check(in_tiff(orientation, compression=compression), orientation)


def test_exif_goes_before_xmp_even_if_it_says_nothing() -> None:
    xmp = XMP.format('tiff:Orientation="6"').encode()
    for kind in ("JPEG", "PNG", "WEBP"):
        for orientation, expected in ((3, 3), (0, 1), (77, 1)):
            check(saved(kind, exif=b"Exif\0\0" + tiff(orientation), xmp=xmp), expected)
        other = Image.Exif()
        other[0x010E] = "a description"
        check(saved(kind, exif=other, xmp=xmp), 6)


def test_xmp_elements_count_as_attributes_do() -> None:
    check(saved("JPEG", xmp=b"<tiff:Orientation>8</tiff:Orientation>"), 8)


@given(
    st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]), st.integers(1, 3), st.binary(min_size=24, max_size=24)
)
def test_any_type_of_the_tag_is_read_as_by_pillow(kind: int, count: int, values: bytes) -> None:
    entry = struct.pack("<HHL", 0x0112, kind, count)
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
    inline = sizes[kind] * count <= 4
    exif = b"II*\0" + struct.pack("<LH", 8, 1) + entry + (values[:4] if inline else struct.pack("<L", 26))
    exif += bytes(4) + (b"" if inline else values)
    reference = Image.Exif()
    reference.load(exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too many values
        expected = reference.get(0x0112, 1)
    assert exif_orientation(exif) == (int(expected) if expected in range(1, 9) else 1)


def test_32_bit_tiffs_are_refused() -> None:
    for array in (PIXELS[..., 0].astype(np.float32) / 255, PIXELS[..., 0].astype(np.int32)):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "TIFF")
        with pytest.raises(DecodeError, match=r"a tiff of mode . with 32 bits per channel: convert it"):
            decode(file.getvalue())


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "AVIF"])
def test_broken_files_are_decode_errors(kind: str) -> None:
    """Whatever Pillow stumbles over in the formats whose headers it reads."""
    data, random = saved(kind), np.random.default_rng(0)
    broken = 0
    for trial in range(200):
        changed = bytearray(data[: random.integers(len(data))] if trial % 4 == 0 else data)
        for place in random.integers(min(len(changed) or 1, 400), size=3):
            changed[place : place + 1] = random.integers(256, size=1, dtype=np.uint8).tobytes()
        try:
            header = read_header(bytes(changed), 10**6)
            assert decode(bytes(changed), max_pixels=10**6).shape[:2] == (header.height, header.width)
        except DecodeError:
            broken += 1
    assert 20 < broken < 200
