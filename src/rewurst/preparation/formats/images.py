"""Corpora of captioned images as a kind: what a scan of foreign shards looks for, and what verification reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ...datamodules.corpora.images import ImageIndex, ImageShards
from ...datamodules.corpora.index import Shard
from ...datamodules.corpora.tar import Member, Sample
from ...datamodules.imaging.corrupt import CorruptImages
from ...datamodules.imaging.facts import (
    IMAGE_SUFFIXES,
    UNREADABLE,
    Facts,
    facts_array,
    facts_of,
    image_suffix,
    no_caption,
)
from ...datamodules.imaging.header import MAX_PIXELS, DecodeError
from ...datamodules.storage.random_access import Bytes
from ..writing.image_index import image_index
from .base import Kind


@dataclass(frozen=True)
class FoundImages:
    """Facts of a shard's samples, ``(samples,)``; which cannot be read and why; the files of the first sample."""

    facts: NDArray[Any]
    unreadable: list[str]
    first: dict[str, bytes]


class Images(Kind):
    """Shards of images with captions, in the style of the large public sets.

    Args:
        caption_key: Key of the .json with the caption; by default it is the .txt.
        max_corrupt: Share of the images that may be unreadable.
        image_member: Suffix of the image, such as ``input.jpg`` (default: jpg, png and others).
        caption_member: Suffix of the caption, such as ``output.txt`` (default: txt, or json with a key).
    """

    def __init__(
        self,
        caption_key: str | None = None,
        max_corrupt: float = 0.1,
        image_member: str | None = None,
        caption_member: str | None = None,
    ) -> None:
        self.caption_key, self.max_corrupt = caption_key, max_corrupt
        self.image_member, self.caption_member = _suffix(image_member), _suffix(caption_member)

    def load(self, folder: str | Path) -> ImageIndex:
        """Return the index of such a corpus."""
        return ImageIndex.load(folder)

    def offset(self, sample: Sample, where: str) -> int:
        """Return the offset of the first header of the sample."""
        return sample.begin

    def read(self, samples: Sequence[Sample], content: Bytes, where: str) -> FoundImages:
        """Read headers of images, captions and scores."""
        facts, unreadable = [], []
        for sample in samples:
            if not self.image_member:
                _refuse_several(sample, where)
            members = {member.extension: _content(member, content) for member in sample.members}
            try:
                facts.append(facts_of(members, self.caption_key, MAX_PIXELS, self.image_member, self.caption_member))
            except DecodeError as error:
                facts.append(UNREADABLE)
                unreadable.append(f"{where}, {sample.key}: {error}")
        first = {member.extension: _content(member, content) for member in samples[0].members}
        return FoundImages(facts_array(facts), unreadable, first)

    def rows(self, found: FoundImages) -> int:
        """One a sample."""
        return len(found.facts)

    def index(
        self, folder: Path, shards: Sequence[Shard], found: Sequence[FoundImages], sources: tuple[str, ...]
    ) -> ImageIndex:
        """Check that there are images, and captions."""
        facts = np.concatenate([one.facts for one in found])
        unreadable = [line for one in found for line in one.unreadable]
        CorruptImages(self.max_corrupt).add(len(facts), unreadable, final=True)
        if not (facts["caption_length"] >= 0).any():
            raise no_caption(shards[0].name, self.caption_key, found[0].first, self.caption_member)
        facts_of_shards = [one.facts for one in found]
        return image_index(
            folder, shards, facts_of_shards, sources, self.caption_key, self.image_member, self.caption_member
        )

    def remarks(self, found: Sequence[FoundImages]) -> str:
        """How many images cannot be read, with the first of them, and how many have no caption."""
        unreadable = [line for one in found for line in one.unreadable]
        bare = sum(int(((one.facts["caption_length"] < 0) & (one.facts["width"] > 0)).sum()) for one in found)
        remarks = f"; {bare} without a caption, which are left out" if bare else ""
        if unreadable:
            corrupt = CorruptImages(1.0)
            corrupt.add(len(unreadable), unreadable)
            remarks += f"; {corrupt.count} unreadable, which are left out: {corrupt.named()}"
        return remarks

    def open(self, folder: str) -> ImageShards:
        """Return the reader of samples."""
        return ImageShards(folder)

    def check_rows(self, opened: ImageShards, rows: range) -> None:
        """Compare the facts of every sample with those next to the index."""
        for row in rows:
            facts = _facts(opened, row)
            if facts_array([facts]).tobytes() != opened.facts[row].tobytes():
                raise UsageError(f"{opened.path}: {opened.locate(row)} is not what facts.npy says of it")


def _facts(shards: ImageShards, row: int) -> Facts:
    index = shards.index
    try:
        return facts_of(
            shards.members(row), index.caption_key or None, MAX_PIXELS, index.image_member, index.caption_member
        )
    except DecodeError:
        return UNREADABLE


def _suffix(given: str | None) -> str:
    """Return a suffix that users write as ``*.input.jpg`` or ``.Input.jpg`` in the form that samples have."""
    return (given or "").lstrip("*").lstrip(".").lower()


def _refuse_several(sample: Sample, where: str) -> None:
    """Raise where a sample has more images than one, or one whose name has a dot: training would see only one."""
    images = [m.extension for m in sample.members if m.extension.rpartition(".")[2] in IMAGE_SUFFIXES]
    if len(images) > 1 or any("." in extension for extension in images):
        raise UsageError(
            f"{where}: webdataset makes one sample {sample.key!r} of {', '.join('.' + name for name in images)}: a key "
            "ends at the first dot of a name; rename the files so that no other dot is in them, or, if it is meant to "
            f"be one sample, name its image: --image_member {images[0]}"
        )


def _content(member: Member, content: Bytes) -> bytes:
    return bytes(content.read(member.begin, member.begin + member.size))


def has_image(extensions: Sequence[str]) -> bool:
    """Whether a sample of files with these extensions holds an image."""
    try:
        image_suffix(dict.fromkeys(extensions))
    except DecodeError:
        return False
    return True
