"""List captioned pictures from a folder, a table of file names and captions, or ``builtin:shapes``.

The order is fixed. Images and caption files are read later, by the workers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import UsageError
from ...datamodules.imaging.facts import IMAGE_SUFFIXES
from ...datamodules.storage.random_access import is_remote
from ...datamodules.storage.url import Place, Url, find, place, seekable
from ...hints import did_you_mean, nearest
from . import shapes
from .compressed_files import COMPRESSIONS, lines
from .records import LINE_BYTES
from .source_files import walk
from .tables import PARQUET_BATCH_ROWS

IMAGE_FIELDS = ("file_name", "image", "path")  # file_name is what Hugging Face's imagefolder uses
CAPTION_FIELDS = ("text", "caption")
TABLES = ("metadata.jsonl", "metadata.parquet")  # as imagefolder calls them
EXPECTED = "a folder of images, a .jsonl or .parquet with their names and captions, or builtin:shapes"


class Drawing(NamedTuple):
    """A picture to draw."""

    shape: shapes.Shape
    seed: int
    size: int


class Picture(NamedTuple):
    """A picture with its caption.

    Attributes:
        name: Name for messages.
        image: File, its content, or a picture to draw.
        caption: Text, or the file that contains it; None if there is no caption.
        values: Other values to store in ``.json``, or the file that contains them.
        side: ``train``, ``val`` or ``unseen`` if the source assigns pictures to validation itself.
    """

    name: str
    image: Place | bytes | Drawing
    caption: Place | str | None
    values: Place | dict[str, Any]
    side: str | None = None


class Listing(NamedTuple):
    """Pictures of a source, their number if known, the sides they belong to, and a remark for the summary."""

    pictures: Iterable[Picture]
    total: int | None
    sides: tuple[str, ...] = ()
    remark: str = ""


def drawings(name: str, size: int, pictures: int, seed: int) -> Listing:
    """List the pictures to draw: ``pictures`` per seen combination for training, one for validation, and unseen ones.

    Raises:
        UsageError: No such family, or a number out of range.
    """
    if name not in shapes.FAMILIES:
        near = nearest(name, shapes.FAMILIES)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"source {name}: no such built-in pictures, expected {' or '.join(shapes.FAMILIES)}{hint}")
    for what, value, least in (("image_size", size, 16), ("pictures", pictures, 1)):
        if value < least:
            raise UsageError(f"{what} is {value}, expected {least} or more")
    unseen = shapes.held_out(name)
    seen = [shape for shape in shapes.combinations(name) if shape not in set(unseen)]
    sides = {"train": (seen, pictures), "val": (seen, 1), "unseen": (unseen, pictures)}

    def draw() -> Iterator[Picture]:
        for side, (of, number) in sides.items():
            for i in range(number):  # all combinations once, then again
                variant = shapes.picture_seed(seed, side, i)
                for shape in _shuffled(of, variant):
                    caption = shapes.caption(shape)
                    yield Picture(caption, Drawing(shape, variant, size), caption, shape._asdict(), side)

    return Listing(draw(), sum(len(of) * number for of, number in sides.values()), tuple(sides))


def _shuffled(of: Iterable[shapes.Shape], key: int) -> list[shapes.Shape]:
    """Order combinations by hash, so that the first few pictures show all kinds."""

    def hashed(shape: shapes.Shape) -> bytes:
        return hashlib.blake2b(f"{key} {shapes.caption(shape)}".encode(), digest_size=8).digest()

    return sorted(of, key=hashed)


def listing(source: str, image_field: str | None, caption_field: str | None) -> Listing:
    """List the pictures of a folder or a table.

    Args:
        source: Folder, ``.jsonl`` or ``.parquet``, or the URL of one.
        image_field: Field of a table with the file name (default: the first of ``IMAGE_FIELDS`` that exists).
        caption_field: Field of a table with the caption (default: the first of ``CAPTION_FIELDS`` that exists).

    Raises:
        UsageError: No such source, an unknown kind, or a source without a picture or a caption.
    """
    path = place(source)
    if isinstance(path, Path) and not path.exists():
        raise UsageError(f"source {source}: no such file or folder{did_you_mean(path)}")
    if (isinstance(path, Path) and path.is_dir()) or (isinstance(path, Url) and _table_kind(path) is None):
        tables = [path / name for name in TABLES if (path / name).is_file()]
        if not tables:
            return _folder(path)
        path = tables[0]
    kind = _table_kind(path)
    if kind is None:
        raise UsageError(f"source {source}: unknown kind {path.suffix or path.name!r}, expected {EXPECTED}")
    rows, count = (_json_rows(path), None) if kind == ".jsonl" else _parquet_rows(path)
    return Listing(_table(path, rows, image_field, caption_field), count)


def _table_kind(path: Place) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS]
    return suffixes[-1] if suffixes and suffixes[-1] in (".jsonl", ".parquet") else None


def _folder(folder: Place) -> Listing:
    files: Sequence[Place] = find(folder.url) if isinstance(folder, Url) else _sorted(folder)
    images = [path for path in files if path.suffix.lower()[1:] in IMAGE_SUFFIXES and not path.name.startswith(".")]
    if not images:
        kinds = ", ".join("." + suffix for suffix in IMAGE_SUFFIXES)
        raise UsageError(f"source {folder}: the folder has no image ({kinds}); expected {EXPECTED}")
    known = set(files)
    pictures = []
    for path in images:
        beside = {suffix: path.with_suffix(suffix) for suffix in (".txt", ".json")}
        caption, values = (beside[suffix] if beside[suffix] in known else None for suffix in beside)
        pictures.append(Picture(str(path), path, caption, values or {}))
    if all(picture.caption is None for picture in pictures):
        raise UsageError(
            f"source {folder}: none of its {len(pictures)} images has a caption, expected a .txt beside each, such as "
            f"{images[0].with_suffix('.txt')}, or a {' or '.join(TABLES)} with file_name and text"
        )
    used = {*images, *(p.caption for p in pictures), *(p.values for p in pictures if not isinstance(p.values, dict))}
    others = [path for path in files if path not in used]
    remark = f"{len(others)} other files left out (the first: {others[0]})" if others else ""
    return Listing(pictures, len(pictures), remark=remark)


def _sorted(folder: Path) -> list[Path]:
    return sorted(walk(folder), key=lambda path: path.relative_to(folder).parts)


def _table(
    path: Place, rows: Iterator[tuple[str, dict[str, Any]]], image_field: str | None, caption_field: str | None
) -> Iterator[Picture]:
    first: tuple[str, str] | None = None
    for where, row in rows:
        if first is None:
            first = (
                _field(where, row, image_field, IMAGE_FIELDS, "image_field"),
                _field(where, row, caption_field, CAPTION_FIELDS, "caption_field"),
            )
        image, caption = row.get(first[0]), row.get(first[1])
        if isinstance(image, dict) and isinstance(
            image.get("bytes"), bytes
        ):  # how the datasets library stores its Image feature
            content: Place | bytes = image["bytes"]
        elif isinstance(image, str) and image:
            content = Url(image) if is_remote(image) else path.parent / image
        else:
            raise UsageError(f"{where}: {first[0]} holds {image!r:.60}, expected a file name")
        if caption is not None and not isinstance(caption, str):
            raise UsageError(f"{where}: {first[1]} holds {caption!r:.60}, expected text")
        # Values that JSON can store and a filter can use; the caption has a tar member of its own.
        values = {key: value for key, value in row.items() if key != first[1] and _is_plain(value)}
        yield Picture(where, content, caption, values)
    if first is None:
        raise UsageError(f"source {path}: it has no rows")


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _field(where: str, row: dict[str, Any], asked: str | None, usual: tuple[str, ...], option: str) -> str:
    for name in (asked,) if asked is not None else usual:
        if name in row:
            return name
    names = repr(asked) if asked is not None else " or ".join(map(repr, usual))
    raise UsageError(f"{where}: no field {names}; --{option} can be one of: {', '.join(row) or 'none'}")


def _json_rows(path: Place) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _parquet_rows(path: Place) -> tuple[Iterator[tuple[str, dict[str, Any]]], int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def unreadable(error: Exception) -> UsageError:
        return UsageError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})")

    try:
        count = int(pq.read_metadata(seekable(path)).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(error) from None

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
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
