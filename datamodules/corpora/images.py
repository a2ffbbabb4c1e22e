"""Read the samples of image shards by number: the files of one key, without unpacking the tar."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ..imaging.facts import FACTS_DTYPE, captions_of, image_suffix
from ..imaging.filters import Filters
from ..imaging.geometry import Size, nearest_bucket
from ..storage.random_access import join, open_bytes
from .index import ABSENT_IF_EMPTY, CorpusIndex
from .open_shards import OpenShard, Shards, ends_of, places
from .tar import is_left_out

FACTS_FILE = "facts.npy"


@dataclass(frozen=True, kw_only=True)
class ImageIndex(CorpusIndex):
    """The contents of ``index.json``; a row is a sample.

    Attributes:
        caption_key: Key of the captions in each sample's .json; empty if they are in the .txt.
        facts_sha256: SHA-256 of ``facts.npy``, which decides what filters keep.
        image_member: Suffix of the members that are images; empty for the usual suffixes.
        caption_member: Suffix of the members that contain captions; empty for the usual suffixes.
    """

    facts_sha256: str
    caption_key: str = ""
    image_member: str = field(default="", metadata=ABSENT_IF_EMPTY)
    caption_member: str = field(default="", metadata=ABSENT_IF_EMPTY)
    kind: str = "images"

    def image(self, members: Mapping[str, bytes]) -> bytes:
        """Return the image file among the members of a sample.

        Raises:
            DecodeError: The sample has no image.
        """
        return members[image_suffix(members, self.image_member)]

    def captions(self, members: Mapping[str, bytes]) -> list[str]:
        """Return the captions among the members of a sample, an empty list if there are none.

        Raises:
            DecodeError: The captions are not text.
        """
        return captions_of(members, self.caption_key or None, self.caption_member)

    def check(self, where: str) -> None:
        """Raise ``UsageError`` if the index at ``where`` contradicts itself."""
        super().check(where)
        for shard in self.shards:
            if shard.samples != shard.rows:
                raise UsageError(
                    f"{where}: {shard.name} has {shard.rows} rows in {shard.samples} samples, expected equal"
                )


def read_facts(folder: str, index: ImageIndex) -> NDArray[Any]:
    """Return the facts of every row: ``FACTS_DTYPE``, shape (rows,).

    Raises:
        UsageError: The file is missing or does not match the index.
    """
    path = join(folder, FACTS_FILE)
    stored = open_bytes(path)
    content = stored.read(0, stored.size)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != index.facts_sha256:
        raise UsageError(f"{path}: SHA-256 is {sha256}, expected {index.facts_sha256}; index the shards again")
    header = io.BytesIO(content[:4096])
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype != FACTS_DTYPE or shape != (index.rows,):
        raise UsageError(f"{path}: contains {dtype} of shape {shape}; index the shards again")
    return np.frombuffer(content, dtype=FACTS_DTYPE, offset=header.tell())  # a view if the file is mapped


class ImageShards:
    """Random access to the samples of one indexed image corpus.

    Instances can be pickled and used after a fork.

    Args:
        folder: Folder made by ``rewurst prepare images`` or ``rewurst prepare index``, or its URL.

    Raises:
        UsageError: There is no corpus, or it cannot be read.
    """

    index_type: ClassVar[type[ImageIndex]] = ImageIndex

    def __init__(self, folder: str | Path) -> None:
        self.path = str(folder)
        self.index = self.index_type.load(folder)
        self.facts = read_facts(self.path, self.index)
        self._ends = ends_of(self.index.shards)
        self._shards = Shards(OpenShard, self.path, self.index)

    def __len__(self) -> int:
        return self.index.rows

    def members(self, row: int) -> Mapping[str, bytes]:
        """Return the contents of a sample's files by extension.

        Raises:
            IndexError: The corpus does not have this row.
            UsageError: A shard is missing or does not match the index.
        """
        shard, sample = self._place(row)
        return sample_members(bytes(shard.sample(sample)), f"{shard.where}, byte {shard.offsets[sample]}")

    def locate(self, row: int) -> str:
        """Return the place of a row for messages: ``"00012.tar, 000120034.jpg"``."""
        shard, sample = self._place(row)
        with tarfile.open(fileobj=io.BytesIO(shard.sample(sample)), mode="r:") as tar:
            return f"{shard.shard.name}, {tar.getnames()[0]}"

    def _place(self, row: int) -> tuple[OpenShard, int]:
        shards, within = places(self._ends, np.asarray([row]), self.path)
        return self._shards[int(shards[0])], int(within[0])


def sample_members(content: bytes, where: str) -> dict[str, bytes]:
    """Return the contents by extension, from the bytes of a sample's headers and files.

    Raises:
        UsageError: The bytes do not start with a tar header.
    """
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for info in tar:
                file = None if is_left_out(info.name) else tar.extractfile(info)
                if file is not None:
                    members[info.name.rsplit("/", 1)[-1].partition(".")[2].lower()] = file.read()
    except tarfile.TarError as error:
        raise UsageError(f"{where}: no tar header found ({error}); the .idx file belongs to another tar") from None
    return members


class ImageRows:
    """Images of a corpus that are trained on, in buckets; each bucket is one training size.

    Args:
        shards: Image corpus.
        filters: Filters that decide which images to keep.
        sizes: Training heights and widths, from tall to wide; an image goes to the one nearest in aspect ratio.
        max_upscale: Largest allowed enlargement; images that need more are left out. None for no limit.

    Attributes:
        left_out: Number of images left out, by reason.

    Raises:
        UsageError: No image is left.
    """

    def __init__(
        self, shards: ImageShards, filters: Filters, sizes: Sequence[Size], max_upscale: float | None = None
    ) -> None:
        self.shards, self.path = shards, shards.path
        self._decides = [asdict(filters), list(map(list, sizes)), max_upscale]
        keep, self.left_out = filters.keep(shards.facts)
        nearest = nearest_bucket(shards.facts["height"], shards.facts["width"], list(sizes), max_upscale)
        if too_small := int((keep & (nearest < 0)).sum()):
            self.left_out["max_upscale"] = too_small
        self._rows = [np.flatnonzero(keep & (nearest == bucket)) for bucket in range(len(sizes))]
        self.buckets = [len(rows) for rows in self._rows]
        if not sum(self.buckets):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.left_out.items())
            raise UsageError(f"{self.path}: none of its {len(shards)} images is left to train on; left out: {reasons}")

    def __len__(self) -> int:
        return sum(self.buckets)

    def in_bucket(self, bucket: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row in the corpus of each image of a bucket."""
        return self._rows[bucket][index]

    @property
    def index(self) -> ImageIndex:
        """Index of the corpus."""
        return self.shards.index

    def image(self, row: int) -> tuple[Mapping[str, bytes], Size]:
        """Return the members of an image, and its height and width from the index."""
        facts = self.shards.facts[row]
        return self.shards.members(row), (int(facts["height"]), int(facts["width"]))

    def nearest_buckets(self, sizes: Sequence[Size], counts: Sequence[int] | None = None) -> list[int]:
        """Return the bucket to read from for each size: its own or, if that is empty, the nearest in aspect ratio.

        Args:
            sizes: Sizes of the buckets.
            counts: Number of usable images per bucket; all images by default.
        """
        filled = [bucket for bucket, count in enumerate(counts or self.buckets) if count]
        aspects = [math.log(width / height) for height, width in sizes]
        return [min(filled, key=lambda bucket: abs(aspects[bucket] - aspect)) for aspect in aspects]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the corpus and of everything that decides which image has which number."""
        content: list[Any] = [self.shards.index.fingerprint(), *self._decides]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def locate(self, row: int) -> str:
        """Return the place of an image for messages."""
        return self.shards.locate(row)
