"""Samples of image shards by number: the files of one key, read without unpacking the tar."""

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
        caption_key: Key of the .json under which captions stand; empty where they are the .txt.
        facts_sha256: Of ``facts.npy``, which decides what filters keep.
        image_member: Suffix of the members that are the images; empty for the usual ones.
        caption_member: Suffix of the members that hold the captions; empty for the usual ones.
    """

    facts_sha256: str
    caption_key: str = ""
    image_member: str = field(default="", metadata=ABSENT_IF_EMPTY)
    caption_member: str = field(default="", metadata=ABSENT_IF_EMPTY)
    kind: str = "images"

    def image(self, members: Mapping[str, bytes]) -> bytes:
        """The image file among the members of a sample.

        Raises:
            DecodeError: There is none.
        """
        return members[image_suffix(members, self.image_member)]

    def captions(self, members: Mapping[str, bytes]) -> list[str]:
        """The captions among the members of a sample, none where it has none.

        Raises:
            DecodeError: They are not text.
        """
        return captions_of(members, self.caption_key or None, self.caption_member)

    def check(self, where: str) -> None:
        """Raise where the index at ``where`` contradicts itself."""
        super().check(where)
        for shard in self.shards:
            if shard.samples != shard.rows:
                raise UsageError(
                    f"{where}: {shard.name} has {shard.rows} rows in {shard.samples} samples, expected equal"
                )


def read_facts(folder: str, index: ImageIndex) -> NDArray[Any]:
    """Facts of every row, ``FACTS_DTYPE`` of shape (rows,).

    Raises:
        UsageError: The file is missing or not the one that belongs to the index.
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
        raise UsageError(f"{path}: holds {dtype} of shape {shape}; index the shards again")
    return np.frombuffer(content, dtype=FACTS_DTYPE, offset=header.tell())  # where the file is mapped, a view of it


class ImageShards:
    """The samples of one indexed corpus of images, in any order.

    It may be pickled and used after a fork.

    Args:
        folder: A folder that ``rewurst prepare images`` or ``rewurst prepare index`` made, or its URL.

    Raises:
        UsageError: No corpus there, or one that cannot be read.
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
        """Contents of a sample's files by extension.

        Raises:
            IndexError: A row that the corpus does not have.
            UsageError: A shard that is missing or is not what the index says.
        """
        shard, sample = self._place(row)
        return sample_members(bytes(shard.sample(sample)), f"{shard.where}, byte {shard.offsets[sample]}")

    def locate(self, row: int) -> str:
        """Where a row lies, for messages: ``"00012.tar, 000120034.jpg"``."""
        shard, sample = self._place(row)
        with tarfile.open(fileobj=io.BytesIO(shard.sample(sample)), mode="r:") as tar:
            return f"{shard.shard.name}, {tar.getnames()[0]}"

    def _place(self, row: int) -> tuple[OpenShard, int]:
        shards, within = places(self._ends, np.asarray([row]), self.path)
        return self._shards[int(shards[0])], int(within[0])


def sample_members(content: bytes, where: str) -> dict[str, bytes]:
    """Contents by extension, from the bytes of a sample's headers and files.

    Raises:
        UsageError: There is no tar header where one should be.
    """
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for info in tar:
                file = None if is_left_out(info.name) else tar.extractfile(info)
                if file is not None:
                    members[info.name.rsplit("/", 1)[-1].partition(".")[2].lower()] = file.read()
    except tarfile.TarError as error:
        raise UsageError(f"{where}: no tar header there ({error}); the sidecar belongs to another tar") from None
    return members


class ImageRows:
    """The images of a corpus that are trained on; a lane is a size in which they are shown.

    Args:
        shards: The corpus.
        filters: What to keep of it.
        sizes: Heights and widths shown, from tall to wide; an image belongs to the one of the nearest aspect ratio.
        max_upscale: Images that would have to be enlarged by more are left out, none for no limit.

    Attributes:
        left_out: How many images are not trained on, by reason.

    Raises:
        UsageError: Nothing is kept.
    """

    def __init__(
        self, shards: ImageShards, filters: Filters, sizes: Sequence[Size], max_upscale: float | None = None
    ) -> None:
        self.shards, self.path = shards, shards.path
        self._decides = [asdict(filters), list(map(list, sizes)), max_upscale]
        keep, self.left_out = filters.keep(shards.facts)
        bucket = nearest_bucket(shards.facts["height"], shards.facts["width"], list(sizes), max_upscale)
        if too_small := int((keep & (bucket < 0)).sum()):
            self.left_out["max_upscale"] = too_small
        self._rows = [np.flatnonzero(keep & (bucket == lane)) for lane in range(len(sizes))]
        self.lanes = [len(rows) for rows in self._rows]
        if not sum(self.lanes):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.left_out.items())
            raise UsageError(f"{self.path}: no image of {len(shards)} is left to train on; left out: {reasons}")

    def __len__(self) -> int:
        return sum(self.lanes)

    def in_lane(self, lane: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number in the corpus of each image of a lane."""
        return self._rows[lane][index]

    @property
    def index(self) -> ImageIndex:
        """Index of the corpus."""
        return self.shards.index

    def image(self, row: int) -> tuple[Mapping[str, bytes], Size]:
        """Return the members of an image, and its height and width as the index says."""
        facts = self.shards.facts[row]
        return self.shards.members(row), (int(facts["height"]), int(facts["width"]))

    def nearest_lanes(self, sizes: Sequence[Size], counts: Sequence[int] | None = None) -> list[int]:
        """For each size the lane to read from: its own, or where that is empty the one of the nearest aspect ratio.

        Args:
            sizes: Of the lanes.
            counts: Images that count, by lane; by default all.
        """
        filled = [lane for lane, count in enumerate(counts or self.lanes) if count]
        aspects = [math.log(width / height) for height, width in sizes]
        return [min(filled, key=lambda lane: abs(aspects[lane] - aspect)) for aspect in aspects]

    def fingerprint(self) -> str:
        """SHA-256 over the corpus and all that decides which image is which."""
        content: list[Any] = [self.shards.index.fingerprint(), *self._decides]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def locate(self, row: int) -> str:
        """Where an image lies, for messages."""
        return self.shards.locate(row)
