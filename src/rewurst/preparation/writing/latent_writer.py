"""Write shards of latents, each by itself, and their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ... import UsageError
from ...datamodules.corpora.images import ImageShards
from ...datamodules.corpora.index import INDEX_FILE, Shard
from ...datamodules.corpora.latents import LatentIndex
from .destination import Target
from .image_index import write_facts
from .shard_file import ShardFile


@dataclass(frozen=True)
class LatentFolder:
    """A folder of latents that is being filled.

    Args:
        target: The folder, or its URL.
        images: Corpus whose latents they are.
        rows_per_shard: Samples in each shard but the last.
        described: Fields of ``LatentIndex``, from ``what`` on.
    """

    target: Target
    images: ImageShards
    rows_per_shard: int
    described: Mapping[str, Any]

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        return -(-len(self.images) // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """Return the rows of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, len(self.images)))

    def is_complete(self) -> bool:
        """Return whether the index has been written."""
        return self.target.read(INDEX_FILE) is not None

    def check_complete(self) -> None:
        """Compare what there is with what is asked for.

        Raises:
            UsageError: It was made from other images, by other networks or with other options, or a shard is missing.
        """
        index = LatentIndex.load(self.target.root)
        sources = LatentIndex.not_in_fingerprint()
        asked = {name: value for name, value in self.described.items() if name not in sources}
        asked["samples_per_shard"] = min(self.rows_per_shard, len(self.images))
        there = asdict(index) | {"samples_per_shard": index.shards[0].rows}
        for name, value in asked.items():
            if json.dumps(there[name]) != json.dumps(value):
                raise UsageError(f"{self.target} was made {_difference(name, there[name], value)}; {_HOW_TO_REPLACE}")
        names = set(self.target.names())
        if missing := [shard.name for shard in index.shards if shard.name not in names]:
            raise UsageError(f"{self.target}: its index lists {missing[0]}, which is missing; {_HOW_TO_REPLACE}")

    def write(self, shard: int, samples: Sequence[Mapping[str, bytes]]) -> dict[str, Any]:
        """Write a shard of samples' members, and return its entry in the index."""
        first = self.rows(shard).start
        with self.target.scratch() as scratch, ShardFile(scratch / f"latents-{shard:06d}.tar") as file:
            for number, members in enumerate(samples):
                file.add_members(f"{first + number:09d}", members)
            entry = file.close()
            for path in (file.path, file.path.with_suffix(".idx")):
                self.target.publish(path, path.name)
        return asdict(entry)

    def finish(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write the facts, and then the index from the entries of all shards."""
        index = LatentIndex(
            shards=tuple(Shard(**entry) for entry in entries),
            rows=len(self.images),
            sources=(self.images.path,),
            facts_sha256=write_facts(self.target.root, self.images.facts),
            **self.described,
        )
        self.target.write(INDEX_FILE, index.content())


_HOW_TO_REPLACE = "add --overwrite to make the latents again, or choose another folder"


def _difference(name: str, there: Any, asked: Any) -> str:
    """Say how latents differ from those asked for; fingerprints themselves tell nobody anything."""
    if not name.endswith("_sha256"):
        return f"with {name} {there}, not {asked}"
    what = name.removesuffix("_sha256").replace("_", " ")
    if what == "images":
        return "from other images or captions than there are now"
    return f"by another {what}" if asked else f"with a {what}"
