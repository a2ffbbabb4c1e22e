"""Shards of latents, each by itself, so that processes share them and a killed preparation keeps those that are whole.

1. ``plan.json`` says what is being made; another preparation into the same folder is refused.
2. A shard is written under another name; its sidecar, renamed last, says that it is whole.
3. ``index.json`` comes when all shards are there, and the plan goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import UsageError
from .corpus_index import INDEX_FILE, Shard, write_atomically, writing
from .foreign import sha256_of
from .image_index import write_facts
from .image_shards import ImageShards
from .latent_index import EMPTY_TEXT_FILE, LatentIndex
from .shard_file import ShardFile
from .storage import open_bytes

PLAN_FILE = "plan.json"
NAME = "latents"


@dataclass(frozen=True)
class LatentFolder:
    """A folder that is being filled.

    Args:
        path: Of the folder.
        images: Whose latents they are.
        rows_per_shard: Samples in each shard but the last.
        described: Fields of ``LatentIndex``, from ``what`` on.
        options: What else decides the bytes.
    """

    path: Path
    images: ImageShards
    rows_per_shard: int
    described: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def shards(self) -> int:
        """Number of shards in all."""
        return -(-len(self.images) // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """Rows of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, len(self.images)))

    def begin(self, empty_text: bytes | None) -> None:
        """Make the folder, or go on in it.

        Raises:
            UsageError: It holds something else.
        """
        sources = LatentIndex.not_in_fingerprint()
        plan = {name: value for name, value in self.described.items() if name not in sources}
        content = json.dumps({**plan, **self.options, "rows_per_shard": self.rows_per_shard}, sort_keys=True)
        path = self.path / PLAN_FILE
        if path.exists():
            before, now = json.loads(path.read_text()), json.loads(content)
            for name in now:
                if before.get(name) != now[name]:
                    raise UsageError(
                        f"{self.path} was begun with {name} {before.get(name)}, not {now[name]}: give the same again, "
                        "or choose another folder"
                    )
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UsageError(f"out {self.path} is not empty and holds no preparation to go on: choose another folder")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if empty_text is not None:
                write_atomically(self.path / EMPTY_TEXT_FILE, empty_text)
            write_atomically(path, content + "\n")

    def is_complete(self) -> bool:
        """Whether everything was made before."""
        return (self.path / INDEX_FILE).exists()

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is there."""
        return self._tar(shard).with_suffix(".idx").exists()

    def write(self, shard: int, samples: Sequence[Mapping[str, bytes]]) -> None:
        """Write a shard of samples' members; it appears when it is whole."""
        tar, first = self._tar(shard), self.rows(shard).start
        file = ShardFile(tar.with_name(f".{tar.name}"))
        try:
            for number, members in enumerate(samples):
                file.add_members(f"{first + number:09d}", members)
            file.close()
        except BaseException:
            file.discard()
            raise
        with writing(tar):
            file.path.rename(tar)
            file.path.with_suffix(".idx").rename(tar.with_suffix(".idx"))

    def finish(self) -> bool:
        """Write the index if all shards are there, and say whether they are."""
        if not all(map(self.is_whole, range(self.shards))):
            return False
        facts_sha256 = write_facts(self.path, self.images.facts)
        shards = []
        for number in range(self.shards):
            content, rows = open_bytes(str(self._tar(number))), len(self.rows(number))
            shards.append(Shard(self._tar(number).name, content.size, rows, rows, sha256_of(content)))
        index = LatentIndex(
            shards=tuple(shards),
            rows=len(self.images),
            sources=(self.images.path,),
            facts_sha256=facts_sha256,
            **self.described,
        )
        index.save(self.path)
        (self.path / PLAN_FILE).unlink(missing_ok=True)
        return True

    def _tar(self, shard: int) -> Path:
        return self.path / f"{NAME}-{shard:06d}.tar"
