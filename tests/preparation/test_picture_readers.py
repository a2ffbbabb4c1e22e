"""Every kind of image file in every reader gives the pixels of Pillow's ``exif_transpose``, over white."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from rewurst.datamodules import Corpus, ImageTextDataModule
from rewurst.datamodules.corpora.images import ImageRows, ImageShards
from rewurst.datamodules.image_reader import CropSettings, ImageReader
from rewurst.datamodules.imaging.decoding import DecodeError, read_image
from rewurst.datamodules.imaging.filters import Filters
from rewurst.datamodules.sampling.micro_batches import EvaluationRows, SampleIndices
from rewurst.modules.networks import SemanticCompressor
from rewurst.preparation.images import prepare_images
from rewurst.preparation.index import index_shards
from rewurst.preparation.latents import prepare_latents
from rewurst.preparation.steps.latent_networks import Makers

SIDE = 32
RGBA = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
RGB = Image.fromarray(RGBA[..., :3])
GREY16 = Image.fromarray(RGBA[..., :2].copy().view(np.uint16)[..., 0])


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(kind: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(RGB, kind, exif=exif, **options)


def long_tag(orientation: int) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<LHHHLL", 8, 1, 0x0112, 4, 1, orientation) + bytes(4)


def text_chunk(key: str, text: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, text)
    return saved(RGB, "PNG", pnginfo=info)


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
KINDS: dict[str, bytes] = {
    **{f"turned-{orientation}.jpg": turned("JPEG", orientation) for orientation in range(1, 9)},
    "long.jpg": saved(RGB, "JPEG", exif=long_tag(6)),
    "xmp.jpg": saved(RGB, "JPEG", xmp=XMP),
    "print.jpg": saved(RGB.convert("CMYK"), "JPEG"),
    "grey.jpg": saved(RGB.convert("L"), "JPEG"),
    "progressive.jfif": saved(RGB, "JPEG", progressive=True),
    "turned.png": turned("PNG", 6),
    "profile.png": text_chunk("Raw profile type exif", f"\nexif\n      32\n{long_tag(7).hex()}\n"),
    "xmp.png": text_chunk("XML:com.adobe.xmp", XMP.decode()),
    "rgba.png": saved(Image.fromarray(RGBA, "RGBA"), "PNG"),
    "la.png": saved(Image.fromarray(RGBA, "RGBA").convert("LA"), "PNG"),
    "palette.png": saved(RGB.quantize(16), "PNG"),
    "transparent-palette.png": saved(RGB.quantize(16), "PNG", transparency=3),
    "alphas-of-palette.png": saved(RGB.quantize(4), "PNG", transparency=bytes([0, 100, 200, 255])),
    "transparent-rgb.png": saved(RGB, "PNG", transparency=tuple(map(int, RGBA[3, 3, :3]))),
    "transparent-grey.png": saved(RGB.convert("L"), "PNG", transparency=100),
    "16bit.png": saved(GREY16, "PNG"),
    "transparent-16bit.png": saved(GREY16, "PNG", transparency=int(np.asarray(GREY16)[5, 5])),
    "bits.png": saved(RGB.convert("1"), "PNG"),
    "transparent.gif": saved(RGB.quantize(16), "GIF", transparency=2),
    "turned.webp": turned("WEBP", 5, lossless=True),
    "rgba.webp": saved(Image.fromarray(RGBA, "RGBA"), "WEBP", lossless=True),
    "plain.bmp": saved(RGB, "BMP"),
    "palette.bmp": saved(RGB.quantize(16), "BMP"),
    "rgba.bmp": saved(Image.fromarray(RGBA, "RGBA"), "BMP"),
    "plain.tif": saved(RGB, "TIFF"),
    "turned.tiff": saved(RGB, "TIFF", tiffinfo={0x0112: 6}),
    "packed.tif": saved(RGB, "TIFF", compression="tiff_lzw", tiffinfo={0x0112: 3}),
    "rgba.tif": saved(Image.fromarray(RGBA, "RGBA"), "TIFF"),
    "print.tif": saved(RGB.convert("CMYK"), "TIFF"),
    "16bit.tif": saved(GREY16, "TIFF"),
    "plain.avif": saved(RGB, "AVIF"),
    "turned.avif": turned("AVIF", 6),
    "rgba.avif": saved(Image.fromarray(RGBA, "RGBA"), "AVIF"),
}


def reference(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        grey[grey == image.info.get("transparency", -1)] = 65535
        return np.round(grey / 257).astype(np.uint8)[..., None].repeat(3, axis=-1)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def foreign_tar(folder: Path) -> str:
    """Write and index a tar of the unchanged files."""
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for row, (name, data) in enumerate(KINDS.items()):
            for suffix, content in ((name.rpartition(".")[2], data), ("txt", name.encode())):
                info = tarfile.TarInfo(f"{row:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index_shards([str(folder)], progress=False)
    return str(folder)


def prepared(folder: Path) -> str:
    """Prepare the files of a folder as shards."""
    (folder / "in").mkdir(parents=True)
    for name, data in KINDS.items():
        (folder / "in" / name).write_bytes(data)
        (folder / "in" / name).with_suffix(".txt").write_text("a caption")
    prepare_images([str(folder / "in")], folder / "out", progress=False)
    return str(folder / "out" / "train")


def files(folder: str) -> list[bytes]:
    shards = ImageShards(folder)
    return [shards.index.image(shards.members(row)) for row in range(len(shards))]


def of_training(folder: str, _: Path) -> dict[bytes, Any]:
    data = ImageTextDataModule("d", {"a": Corpus(folder)}, {"a": folder}, SIDE, 8, 8)
    data._opened[folder] = rows = data.open_corpus("a", folder)
    batches = EvaluationRows(rows, data.reader([rows]), 8)
    shown = [image.permute(1, 2, 0).numpy() for number in range(len(batches)) for image in batches[number]["image"]]
    return dict(zip(files(folder), shown, strict=False))


def of_latents(folder: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> dict[bytes, Any]:
    shown: list[Any] = []
    made = Makers.__call__

    def call(self: Makers, images: Any, captions: Any) -> Any:
        shown.extend(image.permute(1, 2, 0).numpy().copy() for image in images)
        return made(self, images, captions)

    monkeypatch.setattr(Makers, "__call__", call)
    compressor = SemanticCompressor.from_preset("tiny", widths=[8, 16, 16], c_latent=4)
    compressor.save(scratch / "compressor")
    prepare_latents(folder, scratch / "latents", str(scratch / "compressor"), SIDE, progress=False)
    return dict(zip(files(folder), shown, strict=True))


@pytest.mark.parametrize("made", [foreign_tar, prepared])
@pytest.mark.parametrize("reader", ["training", "latents"])
def test_training_and_latents_see_what_pillow_sees(
    made: Callable[[Path], str], reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "corpus")
    seen = of_training(folder, tmp_path) if reader == "training" else of_latents(folder, tmp_path, monkeypatch)
    assert set(seen) == set(KINDS.values()), "files stay as they are"
    for name, data in KINDS.items():
        close(seen[data], reference(data), name)


@pytest.mark.parametrize("name", KINDS)
def test_reconstruction_sees_what_pillow_sees(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(KINDS[name])
    close(read_image(tmp_path / name), reference(KINDS[name]), name)


def close(found: NDArray[np.uint8], expected: NDArray[np.uint8], name: str) -> None:
    """Check equality up to rounding of the blend with white."""
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=1, err_msg=name)
    if "rgba" not in name and "la." not in name and "alphas" not in name:
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("AVIF", {}), ("TIFF", {}), ("BMP", {})],
)
def test_the_index_contains_upright_sizes(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = RGB.resize((48, 32))
    data = saved(wide, kind, **({"tiffinfo": {0x0112: 6}} if kind == "TIFF" else {"exif": exif}))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for suffix, content in (({"JPEG": "jpg"}.get(kind, kind.lower()), data), ("txt", b"a")):
            info = tarfile.TarInfo(f"0.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index_shards([str(tmp_path)], progress=False)
    facts = ImageShards(tmp_path).facts[0]
    expected = reference(data).shape[:2]
    assert (facts["height"], facts["width"]) == expected
    assert expected == ((32, 48) if kind == "BMP" else (48, 32))


def test_a_size_that_the_index_does_not_say_is_corrupt(tmp_path: Path) -> None:
    """An index of a release that did not read the orientation of the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        turned_ = {"exif": exif} if number == 0 else {}
        (tmp_path / f"{number}.jpg").write_bytes(saved(RGB.resize((48, 32)), "JPEG", **turned_))
        (tmp_path / f"{number}.txt").write_text("a")
    prepare_images([str(tmp_path)], tmp_path / "out", progress=False)
    shards = ImageShards(tmp_path / "out" / "train")
    shards.facts = shards.facts.copy()
    shards.facts[0]["height"], shards.facts[0]["width"] = 32, 48
    reader = ImageReader([ImageRows(shards, Filters(), [(32, 32)])], CropSettings([(32, 32)]))
    none = np.zeros(0, dtype=np.int64)
    with pytest.raises(DecodeError, match="32 x 48 pixels upright, but its index says 48 x 32: index or prepare"):
        reader.show(reader.sources[0], 0, 0, SampleIndices(none, none, none, 0, training=False))
