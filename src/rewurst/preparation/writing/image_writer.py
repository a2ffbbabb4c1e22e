"""Samples of pictures into the shards of one folder, and their index at the end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from ... import UsageError
from ...datamodules.corpora.index import Shard
from ...datamodules.imaging.facts import Facts, facts_array
from ...files import writing
from .image_index import write_image_index
from .shard_file import ShardFile

SHARD_BYTES = 2**28


def is_full(samples: int, size: int, samples_per_shard: int | None) -> bool:
    """Whether a shard of so many samples and bytes takes no more."""
    return samples >= samples_per_shard if samples_per_shard else size >= SHARD_BYTES


def image_key(sample: int) -> str:
    """Key of a sample, by its number in the corpus."""
    return f"{sample:09d}"


def image_shard_name(name: str, number: int) -> str:
    """File name of a shard."""
    return f"{name}-{number:06d}.tar"


def no_picture(folder: str) -> UsageError:
    """That a side would be empty."""
    return UsageError(f"{folder}: no picture is left for it; give more, or another --held_out")


class ImageWriter:
    """Samples into shards of one folder.

    Args:
        folder: To be made.
        name: What shards are called: ``<name>-000000.tar``.
        samples_per_shard: By default about ``SHARD_BYTES``.
        source: For the index.
    """

    def __init__(self, folder: Path, name: str, samples_per_shard: int | None, source: str) -> None:
        self.folder, self.shards = folder, list[Shard]()
        self._name, self._limit, self._source = name, samples_per_shard, source
        self._file: ShardFile | None = None
        self._facts: list[list[Facts]] = []
        self._samples = 0
        with writing(folder):
            folder.mkdir()

    def append(self, sample: Sample) -> None:
        """Write a sample; its key is its number."""
        if self._file is None:
            self._file = ShardFile(self.folder / image_shard_name(self._name, len(self.shards)))
            self._facts.append([])
        self._file.add_members(image_key(self._samples), sample.members)
        self._facts[-1].append(sample.facts)
        self._samples += 1
        if is_full(self._file.samples, self._file.bytes, self._limit):
            self._finish_shard()

    def close(self) -> int:
        """Finish the last shard and write the index.

        Returns:
            The number of samples.

        Raises:
            UsageError: There are none, a full disk.
        """
        if not self._samples:
            raise no_picture(str(self.folder))
        self._finish_shard()
        write_image_index(self.folder, self.shards, [facts_array(facts) for facts in self._facts], [self._source])
        return self._samples

    def abort(self) -> None:
        """Delete what has been written."""
        if self._file is not None:
            self._file.discard()
        shutil.rmtree(self.folder, ignore_errors=True)  # it did not exist, so all in it is ours

    def _finish_shard(self) -> None:
        if self._file is not None:
            self.shards.append(self._file.close())
            self._file = None


class Sample(NamedTuple):
    """A picture ready for a shard: its members, their facts, and a number in [0, 1) that only the file decides."""

    members: dict[str, bytes]
    facts: Facts
    draw: float
    side: str | None
