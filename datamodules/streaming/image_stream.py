"""Captioned images in sequence, for :class:`~rewurst.datamodules.ImageTextDataModule`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from ... import UsageError
from ..corpora.images import ImageIndex
from ..imaging.facts import facts_array, facts_of
from ..imaging.filters import Filters
from ..imaging.geometry import Size, nearest_bucket
from .stream import Stream
from .tars import TarSample, samples

BUFFER_IMAGES = 256
MOST_LEFT_OUT = 100_000  # in a row, before it is taken for a mistake


class ImageStream(Stream[TarSample]):
    """Images and captions in the order of their tars; what filters leave out is counted.

    Args:
        name: Name of the corpus.
        path: What the corpus was asked for as, for messages.
        urls: Tars.
        filters: What to keep.
        size: Height and width shown.
        max_upscale: Images that would have to be enlarged by more are left out, none for no limit.
    """

    def __init__(
        self,
        name: str,
        path: str,
        urls: Sequence[str],
        filters: Filters,
        size: Size,
        max_upscale: float | None = None,
    ) -> None:
        super().__init__(name, path, urls)
        self._filters, self._size, self._max_upscale = filters, size, max_upscale
        self.index = ImageIndex(shards=(), rows=0, sources=self.urls, facts_sha256="")
        self._left_out = 0
        self._latest = ""

    def nearest_buckets(self, sizes: Sequence[Size], counts: Sequence[int] | None = None) -> list[int]:
        """Return the one bucket for the one size."""
        return [0]

    def fingerprint(self) -> str:
        """Return a hash of the tars' names and of what decides which images are kept."""
        parts = [list(self.urls), asdict(self._filters), list(self._size), self._max_upscale, BUFFER_IMAGES]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def open(self, url: str, epoch: int) -> Iterator[TarSample]:
        """Yield the samples of a tar in the order of a pass."""
        marked = (sample | {"__url__": url} for sample in samples(url))
        return self._order.shuffled(marked, url, epoch, BUFFER_IMAGES)

    def image(self, row: int) -> tuple[Mapping[str, bytes], Size]:
        """Return the members of the next image that filters keep, and its height and width.

        Raises:
            DecodeError: It is corrupt.
            UsageError: Filters leave nothing.
        """
        for _ in range(MOST_LEFT_OUT):
            sample = self.next()
            self._latest = f"{sample['__url__']}, sample {sample['__key__']!r}"
            members = {name: content for name, content in sample.items() if not name.startswith("__")}
            facts = facts_array([facts_of(members)])
            kept, _ = self._filters.keep(facts)
            bucket = nearest_bucket(facts["height"], facts["width"], [self._size], self._max_upscale)
            if kept[0] and bucket[0] >= 0:
                return members, (int(facts["height"][0]), int(facts["width"][0]))
            self._left_out += 1
        raise UsageError(
            f"corpus {self.name!r}: filters left out {MOST_LEFT_OUT} images in a row, the last {self._latest}"
        )

    def take_left_out(self) -> int:
        """Return how many images filters have left out since the last call."""
        count, self._left_out = self._left_out, 0
        return count

    def locate(self, row: int) -> str:
        """Return the place of the latest image, for messages."""
        return self._latest or super().locate(row)
