"""Image files become the pixels that Pillow gives, upright, over white; damaged or huge files are refused."""

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from rewurst.datamodules.imaging import decoding
from rewurst.datamodules.imaging.decoding import DecodeError, decode, read_header, reduction_for
from rewurst.datamodules.imaging.header import MAX_SCANS, exif_orientation

WITH_SIMPLEJPEG = pytest.param(
    True, marks=pytest.mark.skipif(decoding._simplejpeg is None, reason="simplejpeg is not installed")
)


def photo(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    """Return smooth noise at several scales, which compresses like photographs."""
    random, total = np.random.default_rng(0), np.full((height, width, channels), 128.0)
    for side, amplitude in ((3, 80.0), (9, 50.0), (31, 25.0)):
        for channel in range(channels):
            coarse = Image.fromarray(random.normal(size=(side, side)).astype(np.float32))
            total[..., channel] += amplitude * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return total.clip(0, 255).astype(np.uint8)


def encoded(picture: Image.Image | NDArray[Any], kind: str, **options: Any) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


KINDS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"quality": 90}, "GIF": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_pillow(kind: str) -> None:
    for height, width in ((1, 1), (37, 53), (64, 17)):
        data = encoded(photo(height, width), kind, **KINDS[kind])
        np.testing.assert_array_equal(decode(data), by_pillow(data))
        assert read_header(data)[:3] == (kind.lower(), height, width)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    for order in ("<", ">"):
        exif = Image.Exif()
        exif.endian = order
        exif[0x0112] = orientation
        data = encoded(photo(20, 34), kind, exif=exif)
        expected = by_pillow(data)
        np.testing.assert_array_equal(decode(data), expected)
        header = read_header(data)
        assert (header.height, header.width, header.orientation) == (*expected.shape[:2], orientation)


def test_a_reduced_jpeg_is_upright_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(128, 256), "JPEG", exif=exif)
    assert decode(data, (100, 50)).shape == (128, 64, 3)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0"]))
def test_damaged_exif_has_no_orientation(noise: bytes, start: bytes) -> None:
    assert 1 <= exif_orientation(start + noise) <= 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16", "CMYK", "RGB16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    picture = Image.fromarray(photo(24, 40))
    expected = np.asarray(picture.convert("RGB"))
    match mode:
        case "CMYK":
            data = encoded(picture.convert("CMYK"), "JPEG", quality=100, subsampling=0)
            tolerance = 8.0
        case "I;16":
            grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
            data = encoded(grey, "PNG")
            expected = np.asarray(picture.convert("L").convert("RGB"))
            tolerance = 0.0
        case "RGB16":
            data = sixteen_bit_png(expected)
            tolerance = 0.0
        case "LA" | "RGBA":
            alpha = Image.fromarray(photo(24, 40, 1)[..., 0])
            layered = picture.convert(mode)
            layered.putalpha(alpha)
            share = np.asarray(alpha)[..., None] / 255
            expected = np.asarray(picture.convert(mode).convert("RGB")) * share + 255 * (1 - share)
            data = encoded(layered, "PNG")
            tolerance = 1.0
        case _:
            data = encoded(picture.convert(mode), "PNG")
            expected = np.asarray(picture.convert(mode).convert("RGB"))
            tolerance = 0.0
    found = decode(data)
    assert (found.dtype, found.shape) == (np.uint8, (24, 40, 3))
    assert np.abs(found - expected.astype(float)).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_color_of_a_palette_is_white(kind: str) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 1])
    found = decode(encoded(image, kind, transparency=1))
    assert found.tolist() == [[[255, 0, 0], [255, 255, 255]], [[0, 0, 255], [255, 255, 255]]]


def test_the_first_picture_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True}))
        assert np.abs(decode(data).astype(int) - [255, 0, 0]).max() <= 1
        assert read_header(data)[1:3] == (6, 8)


@pytest.mark.parametrize("simplejpeg", [False, WITH_SIMPLEJPEG])
@pytest.mark.parametrize(
    ("at_least", "expected"),
    [(None, (301, 403)), ((151, 202), (151, 202)), ((152, 1), (301, 403)), ((30, 30), (38, 51)), ((1, 1), (38, 51))],
)
def test_jpegs_are_reduced_as_far_as_possible(simplejpeg: bool, at_least: Any, expected: tuple[int, int]) -> None:
    data = encoded(photo(301, 403), "JPEG", quality=95)
    found = decode(data, at_least, simplejpeg=simplejpeg)
    assert found.shape == (*expected, 3)
    assert -(-301 // reduction_for(read_header(data), at_least)) == expected[0]
    by = reduction_for(read_header(data), at_least)
    averaged = by_pillow(data)[:296, :400].reshape(296 // by, by, 400 // by, by, 3).mean((1, 3))
    assert np.abs(found[: 296 // by, : 400 // by] - averaged).mean() < 1.5


@pytest.mark.skipif(decoding._simplejpeg is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"restart": 1}])
@pytest.mark.parametrize("grey", [False, True])
def test_simplejpeg_gives_the_pixels_of_pillow(options: dict[str, Any], grey: bool) -> None:
    options = {"restart_marker_blocks" if name == "restart" else name: value for name, value in options.items()}
    image = Image.fromarray(photo(133, 200)).convert("L" if grey else "RGB")
    data = encoded(image, "JPEG", **options)
    for at_least in (None, (60, 60), (30, 30), (17, 17)):
        ours, theirs = (decode(data, at_least, simplejpeg=which).astype(int) for which in (True, False))
        assert np.abs(ours - theirs).max() <= 1


def test_a_small_picture_of_a_reduced_jpeg_is_that_of_the_whole() -> None:
    """Reducing to twice the target before resampling is as good as resampling the whole."""
    data = encoded(photo(512, 512), "JPEG", quality=95)
    pictures = [
        np.asarray(Image.fromarray(decode(data, at_least)).resize((64, 64), Image.Resampling.LANCZOS)).astype(float)
        for at_least in (None, (128, 128))
    ]
    psnr = 10 * np.log10(255**2 / np.mean((pictures[0] - pictures[1]) ** 2))
    assert psnr > 45


def png_of(width: int, height: int, rows: bytes = b"") -> bytes:
    """Return a PNG of any size, whose pixels are zeros that compress a thousandfold."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def sixteen_bit_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return 16-bit RGB, which Pillow reads but does not write."""
    wide = (pixels.astype(">u2") * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    plain = png_of(pixels.shape[1], pixels.shape[0], zlib.compress(rows))
    header = plain[16:24] + bytes([16, 2, 0, 0, 0])
    return plain[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + plain[33:]


def webp_of(width: int, height: int) -> bytes:
    body = b"VP8L" + struct.pack("<IBI", 5, 0x2F, (width - 1) | (height - 1) << 14) + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo(8, 8), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    compressor = zlib.compressobj(9)
    zeros = b"".join(compressor.compress(bytes(6251 * 100)) for _ in range(20)) + compressor.flush()
    gif = bytearray(encoded(Image.new("L", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 50000, 50000)
    return {
        "png": png_of(50000, 50000, zeros),
        "webp": webp_of(16383, 16383),
        "jpeg": jpeg_of(65000, 65000),
        "gif": bytes(gif),
    }


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg", "gif"])
def test_enormous_pictures_are_refused_before_memory_is_taken(kind: str) -> None:
    data = bombs()[kind]
    assert len(data) < 30_000
    tracemalloc.start()
    with pytest.raises(DecodeError, match=r"\d+ x \d+ pixels are more than 134217728"):
        decode(data)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_the_limit_is_an_argument() -> None:
    data = encoded(photo(20, 30), "PNG")
    assert decode(data, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(DecodeError, match="30 x 20 pixels are more than 599"):
        decode(data, max_pixels=599)


def test_a_gif_whose_frame_is_larger_than_its_screen_is_refused() -> None:
    data = bytearray(encoded(Image.new("L", (8, 8)), "GIF"))
    frame = data.index(b",\0\0\0\0\x08\0\x08\0")
    data[frame + 5 : frame + 9] = struct.pack("<HH", 6000, 6000)
    with pytest.raises(DecodeError, match="the image is 6000 x 6000, which differs from its header"):
        decode(bytes(data))


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = encoded(photo(64, 64), "JPEG", progressive=True)
    assert decode(data).shape == (64, 64, 3)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(DecodeError, match=rf"10\d\d scans are more than {MAX_SCANS}"):
        decode(data[:-2] + data[last:-2] * 1000 + data[-2:])


@pytest.mark.parametrize("simplejpeg", [False, WITH_SIMPLEJPEG])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_are_refused(kind: str, simplejpeg: bool) -> None:
    data = encoded(photo(96, 96), kind, **KINDS[kind])
    for share in (0.0, 0.02, 0.3, 0.6, 0.9):
        with pytest.raises(DecodeError) as error:
            decode(data[: int(len(data) * share)], simplejpeg=simplejpeg)
        assert str(error.value)
        assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_corrupt_files_give_a_picture_or_a_reason(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    corrupt = bytearray(encoded(photo(16, 16), kind, **KINDS[kind]))
    for _ in range(data.draw(st.integers(1, 8))):
        corrupt[data.draw(st.integers(0, len(corrupt) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(bytes(corrupt), max_pixels=10**6)
    except DecodeError:
        return
    assert pixels.shape == (*read_header(bytes(corrupt))[1:3], 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"not a JPEG, PNG, WebP or GIF \(empty\)"),
        (b"<svg></svg>", r"not a JPEG, PNG, WebP or GIF \(begins with 3c 73 76 67\)"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "not a JPEG, PNG, WebP or GIF"),
        (png_of(0, 7), "the png header says 0 x 7 pixels"),
        (png_of(7, 7)[:20], "the png header is cut off"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "the jpeg header is cut off"),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode(data)


def test_color_profiles_are_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = photo(8, 8)
    np.testing.assert_array_equal(decode(encoded(pixels, "PNG", icc_profile=profile)), pixels)
