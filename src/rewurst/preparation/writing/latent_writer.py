"""Shards of latents, each by itself, so that processes share them and a killed preparation keeps those that are whole.

1. ``plan.json`` says what is being made; another preparation into the same folder is refused.
2. A shard is written in a folder of its own; its sidecar, which comes last, says that it is whole.
3. ``index.json`` comes when all shards are there, and the plan goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ... import UsageError
from ...datamodules.corpora.images import ImageShards
from ...datamodules.corpora.index import INDEX_FILE, Shard
from ...datamodules.corpora.latents import EMPTY_TEXT_FILE, LatentIndex
from ...datamodules.corpora.tar import sha256_of
from ...datamodules.storage.random_access import open_bytes
from .destination import UNFINISHED, Target
from .image_index import write_facts
from .shard_file import ShardFile

READERS = 16  # threads that read entries, which waits for a server
PLAN_FILE = "plan.json"
NAME = "latents"


@dataclass(frozen=True)
class LatentFolder:
    """A folder that is being filled.

    Args:
        target: The folder, or its URL.
        images: Whose latents they are.
        rows_per_shard: Samples in each shard but the last.
        described: Fields of ``LatentIndex``, from ``what`` on.
        options: What else decides the bytes.
    """

    target: Target
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

    def begin(self, empty_text: Callable[[], bytes | None]) -> None:
        """Make the folder, or go on in it.

        Args:
            empty_text: Makes the states of the empty text; not asked for where the folder has been begun.

        Raises:
            UsageError: It holds something else.
        """
        sources = LatentIndex.not_in_fingerprint()
        plan = {name: value for name, value in self.described.items() if name not in sources}
        content = json.dumps({**plan, **self.options, "rows_per_shard": self.rows_per_shard}, sort_keys=True)
        known = self.target.read(PLAN_FILE)
        if known is not None:
            before, now = json.loads(known), json.loads(content)
            for name in now:
                if before.get(name) != now[name]:
                    raise UsageError(
                        f"{self.target} was begun with {name} {before.get(name)}, not {now[name]}: give the same "
                        "again, or choose another folder"
                    )
            return
        self.target.refuse_file()
        if self.target.names():
            raise UsageError(f"out {self.target} is not empty and holds no preparation to go on: choose another folder")
        states = empty_text()
        if states is not None:
            self.target.write(EMPTY_TEXT_FILE, states)
        self.target.write(PLAN_FILE, content + "\n")

    def is_complete(self) -> bool:
        """Whether everything was made before."""
        return self.target.read(INDEX_FILE) is not None

    def left(self, shards: Iterable[int]) -> list[int]:
        """Those of some shards that are not there yet."""
        names = set(self.target.names())
        return [shard for shard in shards if self._name(shard, "idx") not in names]

    def write(self, shard: int, samples: Sequence[Mapping[str, bytes]]) -> None:
        """Write a shard of samples' members; it appears when it is whole."""
        first = self.rows(shard).start
        with self.target.scratch() as scratch:
            file = ShardFile(scratch / self._name(shard))
            try:
                for number, members in enumerate(samples):
                    file.add_members(f"{first + number:09d}", members)
                entry = file.close()
            except BaseException:
                file.discard()
                raise
            self.target.write(self._entry(shard), json.dumps(asdict(entry)))
            self.target.publish(file.path, self._name(shard))
            self.target.publish(file.path.with_suffix(".idx"), self._name(shard, "idx"))

    def finish(self) -> bool:
        """Write the index if all shards are there, and say whether they are."""
        if self.left(range(self.shards)):
            return False
        with ThreadPoolExecutor(READERS) as pool:
            shards = list(pool.map(self._shard, range(self.shards)))
        index = LatentIndex(
            shards=tuple(shards),
            rows=len(self.images),
            sources=(self.images.path,),
            facts_sha256=write_facts(self.target.root, self.images.facts),
            **self.described,
        )
        self.target.write(INDEX_FILE, index.content())
        self.target.remove(UNFINISHED)
        self.target.remove_file(PLAN_FILE)
        return True

    def _shard(self, number: int) -> Shard:
        """As its writer told, or another process that finished before this one no longer does."""
        if (entry := self.target.read(self._entry(number))) is not None:
            return Shard(**json.loads(entry))
        content, rows = open_bytes(self.target.where(self._name(number))), len(self.rows(number))
        return Shard(self._name(number), content.size, rows, rows, sha256_of(content))

    def _entry(self, shard: int) -> str:
        return f"{UNFINISHED}/{self._name(shard, 'json')}"

    def _name(self, shard: int, suffix: str = "tar") -> str:
        return f"{NAME}-{shard:06d}.{suffix}"
