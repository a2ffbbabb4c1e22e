"""List captioned pictures from folders, tables of file names and captions, or ``builtin:shapes``.

The order is fixed. Images and caption files are read later, by the workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from .... import UsageError
from ....datamodules.storage.url import Url, place
from ....hints import did_you_mean, nearest
from . import shapes
from .folders import EXPECTED, folder_listing
from .listing import Drawing, Listing, Picture
from .tables import table, table_kind

__all__ = ["Drawing", "Listing", "Picture", "drawings", "listing"]


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
        source: Folder, ``.jsonl``, ``.csv`` or ``.parquet``, or the URL of one.
        image_field: Field of a table with the file name or image (default: the first usual name that exists).
        caption_field: Field of a table or of .json files with the caption (default: the first usual name that exists).

    Raises:
        UsageError: No such source, an unknown kind, or a source without a picture or a caption.
    """
    path = place(source)
    if isinstance(path, Path) and not path.exists():
        raise UsageError(f"source {source}: no such file or folder{did_you_mean(path)}")
    if (isinstance(path, Path) and path.is_dir()) or (isinstance(path, Url) and table_kind(path) is None):
        return folder_listing(path, image_field, caption_field)
    if table_kind(path) is None:
        raise UsageError(f"source {source}: unknown kind {path.suffix or path.name!r}, expected {EXPECTED}")
    return Listing(*table(path, image_field, caption_field))
