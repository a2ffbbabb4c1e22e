"""Samples of image shards by number: the files of one key, read without unpacking the tar."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from .. import UsageError
from .image_index import ImageIndex, read_facts
from .shard_reading import OpenShard, Shards, ends_of, places


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
                file = tar.extractfile(info)
                if file is not None:
                    members[info.name.rsplit("/", 1)[-1].partition(".")[2].lower()] = file.read()
    except tarfile.TarError as error:
        raise UsageError(f"{where}: no tar header there ({error}); the sidecar belongs to another tar") from None
    return members
