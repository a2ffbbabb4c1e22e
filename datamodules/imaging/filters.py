"""Which images of a corpus are used, by what its index says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ... import UsageError


@dataclass(frozen=True)
class Filters:
    """Which pictures are trained on. By default all that can be read and have a caption.

    The paper's: ``min_size=512, max_size=4096, max_watermark=0.5, min_aesthetic=5, max_unsafe=0.99``.

    Args:
        min_size: Shortest side in pixels, of the stored picture and of the original (which a set may have enlarged).
        max_size: Longest side in pixels, of both.
        max_watermark: Probability of a watermark.
        min_aesthetic: Aesthetic score.
        max_unsafe: Probability of being unsafe.
        min_caption_length: Characters.
        max_caption_length: Characters.
        unknown: What happens to a picture of which a score asked for is not known.
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
        """Which pictures pass.

        Args:
            facts: ``FACTS_DTYPE``, shape (n,).

        Returns:
            Shape (n,), and how many were dropped by reason; one that fails several counts for the first.
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
    """Values beyond a limit by the limit's name; NaN is beyond none."""
    found = []
    if low is not None:
        found.append((f"min_{name}", values < values.dtype.type(low)))
    if high is not None:
        found.append((f"max_{name}", values > values.dtype.type(high)))
    return found
