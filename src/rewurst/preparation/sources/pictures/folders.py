"""Folders of pictures: tables that name them, caption files next to them, or tables that contain them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .... import UsageError
from ....datamodules.imaging.facts import IMAGE_SUFFIXES
from ....datamodules.storage.url import Place, Url, find
from ..source_files import walk
from .listing import SIDES, SPLITS, Listing, Picture, refuse_gaps, split_of
from .tables import CAPTION_FIELDS, table, table_kind

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as imagefolder calls them
CAPTION_SUFFIXES = (".txt", ".caption")  # the second is what kohya's scripts write
EXPECTED = (
    "a folder of images, a .jsonl or .parquet or .csv with their names and captions, a dataset's folder of the hub, or "
    "builtin:shapes"
)


def folder_listing(folder: Place, image_field: str | None, caption_field: str | None) -> Listing:
    """List the pictures of a folder.

    Args:
        folder: Folder or URL.
        image_field: Field of a table with the file name or image.
        caption_field: Field of a table, or of the .json next to each picture, with the caption.

    Raises:
        UsageError: There is no picture or no caption, or it is not clear what to read.
    """
    if tables := [folder / name for name in TABLES if (folder / name).is_file()]:
        return _tables(folder, tables, image_field, caption_field)
    files: Sequence[Place] = find(folder.url) if isinstance(folder, Url) else _sorted(folder)
    visible = [path for path in files if not any(part.startswith(".") for part in _below(folder, path))]
    images = [path for path in visible if path.suffix.lower()[1:] in IMAGE_SUFFIXES]
    if tables := [path for path in visible if path.name in TABLES]:
        return _tables(folder, tables, image_field, caption_field)._replace(remark=_outside(folder, tables, images))
    if images:
        if image_field is not None:
            raise UsageError(f"image_field is {image_field!r}, which is for tables; {folder} has image files")
        return _images(folder, files, images, caption_field)
    if tables := [path for path in visible if table_kind(path)]:
        return _tables(folder, tables, image_field, caption_field)
    raise _nothing(folder, {path.suffix.lower() for path in files})


def _nothing(folder: Place, suffixes: set[str]) -> UsageError:
    kinds = [f".{suffix}" for suffix in IMAGE_SUFFIXES]
    advice = "; its tars are for rewurst prepare index" if ".tar" in suffixes else ""
    advice += "; convert its HEIC files to JPEG" if suffixes & {".heic", ".heif"} else ""
    return UsageError(
        f"source {folder}: the folder has no image ({', '.join(kinds[:5])}), nor a {', '.join(kinds[5:])}{advice}; "
        f"expected {EXPECTED}"
    )


def _outside(folder: Place, tables: Sequence[Place], images: Sequence[Place]) -> str:
    """Say how many images are not in the folder of a table."""
    inside = [_below(folder, path)[:-1] for path in tables]
    others = [path for path in images if not any(_below(folder, path)[: len(part)] == part for part in inside)]
    return f"{len(others)} images in folders without a table left out (the first: {others[0]})" if others else ""


def _tables(folder: Place, tables: Sequence[Place], image_field: str | None, caption_field: str | None) -> Listing:
    """List the pictures of all tables of a folder, by the splits that their names say."""
    parts = [_below(folder, path) for path in tables]
    for inside, names in itertools.groupby(sorted(parts), key=lambda part: part[:-1]):
        known = [part[-1] for part in names]
        if len(several := [name for name in known if name in TABLES]) > 1:
            raise UsageError(f"source {folder}: it has {' and '.join(several)}; name the one to read")
        refuse_gaps("/".join([str(folder), *inside]), known)
    plain = {part[:-1] for part in parts if part[-1] not in TABLES and not (part[:-1] and part[-2].lower() in SPLITS)}
    if len(plain) > 1:
        listed = ", ".join("/".join(inside) or "." for inside in sorted(plain))
        raise UsageError(f"source {folder}: it has tables in the folders {listed}; name the one to read, or several")
    sides = [split_of(part) for part in parts]
    found = [side for side in SIDES if side in sides or (side == "train" and None in sides)]
    alone = found == ["train"]  # --held_out may take some of it
    ordered = sorted(zip(tables, sides, strict=True), key=lambda pair: SIDES.index(pair[1] or "train"))
    made = [table(path, image_field, caption_field, None if alone else side or "train") for path, side in ordered]
    counts = [count for _, count in made]
    total = None if None in counts else sum(count or 0 for count in counts)
    pictures = itertools.chain.from_iterable(pictures for pictures, _ in made)
    return Listing(pictures, total, () if alone else tuple(found))


def _images(folder: Place, files: Sequence[Place], images: Sequence[Place], caption_field: str | None) -> Listing:
    known = {path.with_suffix(path.suffix.lower()): path for path in files}
    images = [path for path in images if not _is_mask(path, known)]
    fields = CAPTION_FIELDS if caption_field is None else (caption_field,)
    pictures = []
    for path in images:
        caption = _beside(path, CAPTION_SUFFIXES, known) if caption_field is None else None
        pictures.append(Picture(str(path), path, caption, _beside(path, (".json",), known) or {}, None, fields))
    if all(picture.caption is None for picture in pictures):
        _refuse_bare(folder, pictures, caption_field)
    used = {*images, *(p.caption for p in pictures if not isinstance(p.caption, list | str))}
    used |= {p.values for p in pictures if not isinstance(p.values, dict)}
    others = [path for path in files if path not in used]
    remark = f"{len(others)} other files left out (the first: {others[0]})" if others else ""
    sides = [split_of((*_below(folder, path)[:1], "")) for path in images]
    if None in sides or "train" not in sides or len(set(sides)) == 1:
        return Listing(pictures, len(pictures), remark=remark)
    split = [picture._replace(side=side) for picture, side in zip(pictures, sides, strict=True)]
    return Listing(split, len(split), tuple(side for side in SIDES if side in sides), remark)


def _beside(path: Place, suffixes: Sequence[str], known: Mapping[Place, Place]) -> Place | None:
    """Return the first file that has a picture's name with one of the suffixes instead of its own, or after it."""
    names = [path.with_suffix(suffix) for suffix in suffixes]
    names += [path.parent / f"{path.name}{suffix}" for suffix in suffixes if isinstance(path, Path)]
    return next((known[name] for name in names if name in known), None)


def _is_mask(path: Place, known: Mapping[Place, Place]) -> bool:
    """Say whether an image is a mask that OneTrainer has put next to its picture."""
    for mark in ("-masklabel.", "-condlabel."):
        stem, found, _ = path.name.rpartition(mark)
        if found and any(path.parent / f"{stem}.{suffix}" in known for suffix in IMAGE_SUFFIXES):
            return True
    return False


def _refuse_bare(folder: Place, pictures: Sequence[Picture], caption_field: str | None) -> None:
    """Raise if pictures have no caption: neither a file nor, judged by the first one, a field of the .json."""
    first = next((picture.values for picture in pictures if not isinstance(picture.values, dict)), None)
    if first is None:
        image = pictures[0].image
        assert isinstance(image, Path | Url)
        raise UsageError(
            f"source {folder}: none of its {len(pictures)} images has a caption, expected a "
            f"{'.txt' if caption_field is None else '.json'} next to each, such as "
            f"{image.with_suffix('.txt' if caption_field is None else '.json')}, or a {' or '.join(TABLES)} with "
            "file_name and text"
        )
    try:
        values: Any = json.loads(first.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UsageError(f"{first}: not valid JSON ({str(error).splitlines()[0]})") from None
    if isinstance(values, list) and caption_field is None:
        return  # of captions; the workers look at all of them
    keys = [key for key, value in values.items() if isinstance(value, str | list)] if isinstance(values, dict) else []
    fields = pictures[0].caption_fields
    if not any(field in keys for field in fields):
        raise UsageError(
            f"{first}: no field {' or '.join(map(repr, fields))}; --caption_field can be one of: "
            f"{', '.join(keys) or 'none'}"
        )


def _below(folder: Place, path: Place) -> tuple[str, ...]:
    """Return the names of the folders below the source, and the file's."""
    if isinstance(path, Url):
        return path.below or (path.name,)
    assert isinstance(folder, Path)
    return path.relative_to(folder).parts


def _sorted(folder: Path) -> list[Path]:
    return sorted(walk(folder), key=lambda path: path.relative_to(folder).parts)
