"""A corpus of images as rows in lanes: what filters keep, by the shape that it is shown in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import UsageError
from .geometry import Size, nearest_bucket
from .image_facts import Filters
from .image_shards import ImageShards


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
