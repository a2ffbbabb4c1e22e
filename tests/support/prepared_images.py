"""Pictures for tests of preparation, and the samples of a prepared folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from PIL import Image

from rewurst.preparation.images import prepare_images

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
    small = np.random.default_rng(number).integers(256, size=(3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def content(number: int, kind: str = "JPEG", width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    picture(number, width, height).save(file, kind)
    return file.getvalue()


def prepare(source: Path | str, out: Path, **options: Any) -> dict[str, int]:
    return prepare_images(str(source), out, progress=False, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path) -> list[dict[str, Any]]:
    """Return the samples as webdataset reads them, and close the files."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            members = wds.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            found += wds.tariterators.group_by_keys(members)
    return found


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
