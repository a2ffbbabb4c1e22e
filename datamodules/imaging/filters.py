"""Selection of a corpus's images by the facts in its index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ... import UsageError


@dataclass(frozen=True)
class Filters:
    """Limits that an image must meet to be used for training; by default all readable images with a caption are used.

    The paper uses ``min_size=512, max_size=4096, max_watermark=0.5, min_aesthetic=5, max_unsafe=0.99``.

    Args:
        min_size: Minimum of the shorter side in pixels, of the stored image and of the original, which may be smaller.
        max_size: Maximum of the longer side in pixels, of both.
        max_watermark: Maximum probability of a watermark.
        min_aesthetic: Minimum aesthetic score.
        max_unsafe: Maximum probability of being unsafe.
        min_caption_length: Minimum length of the caption in characters.
        max_caption_length: Maximum length of the caption in characters.
        unknown: Whether to keep or drop an image without a required score.
    """

    min_size: int | None = None
    max_size: int | None = None
    max_watermark: float | None = None
    min_aesthetic: float | None = None
    max_unsafe: float | None = None
    min_caption_length: int | None = None
    max_caption_length: int | None = None
    unknown: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.unknown not in ("keep", "drop"):
            raise UsageError(f"unknown is {self.unknown!r}, expected keep or drop")
        for name in ("size", "caption_length"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise UsageError(f"min_{name} is {low}, expected at most max_{name}, which is {high}")
        for name in ("max_watermark", "max_unsafe"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name} is {value}, expected a probability from 0 to 1")

    def keep(self, facts: NDArray[Any]) -> tuple[NDArray[np.bool_], dict[str, int]]:
        """Select the images that pass.

        Args:
            facts: Facts of the images, ``FACTS_DTYPE``, shape (n,).

        Returns:
            Whether each image passes, shape (n,), and the number dropped per reason (the first that applies).
        """
        kept, counts = np.ones(len(facts), dtype=np.bool_), {}
        for reason, fails in self._failures(facts):
            if count := int((kept & fails).sum()):
                counts[reason] = count
            kept &= ~fails
        return kept, counts

    def _failures(self, facts: NDArray[Any]) -> list[tuple[str, NDArray[np.bool_]]]:
        width, height, length = facts["width"], facts["height"], facts["caption_length"]
        original_known = facts["original_width"] > 0
        original = facts["original_width"], facts["original_height"]
        shortest = np.where(original_known, np.minimum.reduce([width, height, *original]), np.minimum(width, height))
        longest = np.maximum.reduce([width, height, *original])
        found = [("unreadable", (width <= 0) | (height <= 0)), ("no caption", length < 0)]
        found += _outside("size", shortest, self.min_size, None) + _outside("size", longest, None, self.max_size)
        for name, low, high in (
            ("watermark", None, self.max_watermark),
            ("aesthetic", self.min_aesthetic, None),
            ("unsafe", None, self.max_unsafe),
        ):
            if self.unknown == "drop" and (low is not None or high is not None):
                found.append((f"{name} unknown", np.isnan(facts[name])))
            found += _outside(name, facts[name], low, high)
        return found + _outside("caption_length", length, self.min_caption_length, self.max_caption_length)


def _outside(
    name: str, values: NDArray[Any], low: float | None, high: float | None
) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return which values are beyond each limit, by its name; NaN is never beyond a limit."""
    found = []
    if low is not None:
        found.append((f"min_{name}", values < values.dtype.type(low)))
    if high is not None:
        found.append((f"max_{name}", values > values.dtype.type(high)))
    return found
