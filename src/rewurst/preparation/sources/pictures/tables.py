"""Tables that name pictures and their captions, or contain both: JSON lines, CSV, Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .... import UsageError
from ....datamodules.imaging.captions import text_of
from ....datamodules.imaging.header import DecodeError
from ....datamodules.storage.random_access import is_remote
from ....datamodules.storage.url import Place, Url, seekable
from ..compressed_files import COMPRESSIONS, lines, open_bytes
from ..records import LINE_BYTES
from ..tables import PARQUET_BATCH_ROWS
from .listing import Picture

IMAGE_FIELDS = ("file_name", "image", "path")  # file_name is what Hugging Face's imagefolder uses
ENCODED_FIELDS = ("jpg", "jpeg", "png", "webp")  # what img2dataset calls the file in its Parquet output
CAPTION_FIELDS = ("text", "caption")
TABLE_KINDS = (".jsonl", ".csv", ".tsv", ".parquet")

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Places for messages, and rows."""


def table_kind(path: Place) -> str | None:
    """Return the suffix of a table without that of its compression, None if it is not a table."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS]
    return suffixes[-1] if suffixes and suffixes[-1] in TABLE_KINDS else None


def table(
    path: Place, image_field: str | None, caption_field: str | None, side: str | None = None
) -> tuple[Iterator[Picture], int | None]:
    """Return the pictures of a table, and their number if that is known before they are read.

    Args:
        path: The table.
        image_field: Field with the file name or the image (default: the first of ``IMAGE_FIELDS`` that exists).
        caption_field: Field with the caption (default: the first of ``CAPTION_FIELDS`` that exists).
        side: Side of all of its pictures.

    Raises:
        UsageError: The file cannot be read; while pictures are read, also a row that does not fit.
    """
    kind = table_kind(path)
    if kind == ".parquet":
        rows, count = _parquet_rows(path)
    else:
        rows, count = _json_rows(path) if kind == ".jsonl" else _csv_rows(path, "\t" if kind == ".tsv" else ","), None
    return _pictures(path, rows, image_field, caption_field, side), count


def _pictures(
    path: Place, rows: Rows, image_field: str | None, caption_field: str | None, side: str | None
) -> Iterator[Picture]:
    first: tuple[str, str] | None = None
    for where, row in rows:
        if first is None:
            first = (
                _field(where, row, image_field, IMAGE_FIELDS, "image_field", ENCODED_FIELDS),
                _field(where, row, caption_field, CAPTION_FIELDS, "caption_field"),
            )
        image, caption = _image(path, where, row, first[0]), row.get(first[1])
        if isinstance(caption, list) and not all(isinstance(text, str) for text in caption):
            raise UsageError(f"{where}: {first[1]} holds {caption!r:.60}, expected text or a list of texts")
        if caption is not None and not isinstance(caption, str | list):
            raise UsageError(f"{where}: {first[1]} holds {caption!r:.60}, expected text")
        # Values that JSON can store and a filter can use; the caption has a tar member of its own.
        values = {key: value for key, value in row.items() if key != first[1] and _is_plain(value)}
        yield Picture(where, image, caption, values, side)
    if first is None:
        raise UsageError(f"source {path}: it has no rows")


def _image(path: Place, where: str, row: dict[str, Any], field: str) -> Place | bytes:
    image = row.get(field)
    if isinstance(image, dict):  # how the datasets library stores its Image feature
        image = image["bytes"] if isinstance(image.get("bytes"), bytes) else image.get("path")
    if isinstance(image, bytes):
        return image
    if image is None and field in ENCODED_FIELDS:  # img2dataset could not download it
        return b""
    if not isinstance(image, str) or not image:
        raise UsageError(f"{where}: {field} holds {image!r:.60}, expected a file name")
    if is_remote(image):
        return Url(image)
    below = path.parent / image
    if "\\" in image and not (isinstance(below, Path) and below.exists()):  # written on Windows
        return path.parent / image.replace("\\", "/")
    return below


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _field(
    where: str,
    row: dict[str, Any],
    asked: str | None,
    usual: tuple[str, ...],
    option: str,
    seldom: tuple[str, ...] = (),
) -> str:
    for name in (asked,) if asked is not None else (*usual, *seldom):
        if name in row:
            return name
    names = repr(asked) if asked is not None else " or ".join(map(repr, usual))
    raise UsageError(f"{where}: no field {names}; --{option} can be one of: {', '.join(row) or 'none'}")


def _json_rows(path: Place) -> Rows:
    for number, line in lines(path, LINE_BYTES):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number}: a line holds a {type(row).__name__}, expected an object")
        yield f"{path}:{number}", row


def _csv_rows(path: Place, delimiter: str) -> Rows:
    with open_bytes(path) as file:
        content = file.read()
    try:
        reader = csv.reader(io.StringIO(text_of(content), newline=""), strict=True, delimiter=delimiter)
        names = next(reader, [])
        for row in reader:
            if row and len(row) != len(names):
                raise UsageError(
                    f"{path}:{reader.line_num}: {len(row)} fields, expected {len(names)} as in the first line; put "
                    "texts with commas in double quotes"
                )
            if row:
                yield f"{path}:{reader.line_num}", dict(zip(names, row, strict=True))
    except DecodeError as error:
        raise UsageError(f"{path}: {error}") from None
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _parquet_rows(path: Place) -> tuple[Rows, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def unreadable(error: Exception) -> UsageError:
        return UsageError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})")

    try:
        count = int(pq.read_metadata(seekable(path)).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(error) from None

    def rows() -> Rows:
        number = 0
        try:
            with pq.ParquetFile(seekable(path), buffer_size=2**20, pre_buffer=False) as file:
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
                    for row in batch.to_pylist():
                        yield f"{path}, row {number}", row
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise unreadable(error) from None

    return rows(), count
