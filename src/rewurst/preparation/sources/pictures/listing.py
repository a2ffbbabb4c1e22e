"""Listing of a source of pictures: pictures with captions, how many, and the sides that they belong to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .... import UsageError
from ....datamodules.storage.url import Place
from . import shapes

SIDES = ("train", "val", "test", "unseen")
# The words that the datasets library takes for its splits.
SPLITS = {"train": "train", "training": "train"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "val")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
_NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


class Drawing(NamedTuple):
    """A picture to draw."""

    shape: shapes.Shape
    seed: int
    size: int


class Picture(NamedTuple):
    """A picture with its captions.

    Attributes:
        name: Name for messages.
        image: File, its content, or a picture to draw.
        caption: Text, texts, or the file that contains them; None if they are among the values, or missing.
        values: Other values to store in ``.json``, or the file that contains them.
        side: Side that the source itself assigns the picture to, one of ``SIDES``.
        caption_fields: Fields of the values to look for captions in if ``caption`` is None.
    """

    name: str
    image: Place | bytes | Drawing
    caption: Place | str | list[str] | None
    values: Place | dict[str, Any]
    side: str | None = None
    caption_fields: tuple[str, ...] = ()


class Listing(NamedTuple):
    """Pictures of a source, their number if known, the sides they belong to, and a remark for the summary."""

    pictures: Iterable[Picture]
    total: int | None
    sides: tuple[str, ...] = ()
    remark: str = ""


def joined(listings: Sequence[Listing]) -> Listing:
    """Return the pictures of several listings, one after the other."""
    if len(listings) == 1:
        return listings[0]
    totals = [listed.total for listed in listings]
    found = {side for listed in listings for side in listed.sides}
    if any(not listed.sides for listed in listings) and found:
        found.add("train")
    return Listing(
        itertools.chain.from_iterable(listed.pictures for listed in listings),
        None if None in totals else sum(total or 0 for total in totals),
        tuple(side for side in SIDES if side in found),
        "; ".join(listed.remark for listed in listings if listed.remark),
    )


def split_of(parts: Sequence[str]) -> str | None:
    """Return the side that a file belongs to by its folders and its name, None if these say nothing.

    Args:
        parts: Names of the folders below the source, and the file's.

    Raises:
        UsageError: The name is that of a numbered part of a split that is not known.
    """
    stem = parts[-1].partition(".")[0].lower()
    if numbered := _NUMBERED.fullmatch(stem):
        if numbered["split"] not in SPLITS:
            raise UsageError(
                f"{'/'.join(parts)}: split {numbered['split']!r} is unknown, expected one of {', '.join(SPLITS)}; name "
                "the files that you want"
            )
        return SPLITS[numbered["split"]]
    named = [SPLITS[part.lower()] for part in parts[:-1] if part.lower() in SPLITS]
    return SPLITS.get(stem, named[0] if named else None)


def refuse_gaps(where: str, names: Sequence[str]) -> None:
    """Raise if parts ``train-00000-of-00003`` are missing among the files of a folder."""
    found: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if numbered := _NUMBERED.fullmatch(name.partition(".")[0]):
            found.setdefault((numbered["split"], int(numbered["count"])), set()).add(int(numbered["number"]))
    for (split, count), numbers in found.items():
        if len(numbers) != count:
            raise UsageError(
                f"source {where}: it has {len(numbers)} of the {count} files of {split}; get the others too"
            )
