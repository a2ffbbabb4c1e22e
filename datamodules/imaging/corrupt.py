"""Count of unusable images, which names the first ones and stops when their share is too large."""

from __future__ import annotations

from collections.abc import Sequence

from ... import UsageError

NAMED = 3  # number of images that summaries name; the others are only counted


class CorruptImages:
    """Count of corrupt images.

    Args:
        max_corrupt: Largest share of images that may be corrupt, in [0, 1].
        settled: Number of images before which the share is checked only at the end.
    """

    def __init__(self, max_corrupt: float, settled: int = 200) -> None:
        self.max_corrupt, self.settled = max_corrupt, settled
        self.seen = self.count = 0
        self.first: list[str] = []

    def add(self, seen: int, corrupt: Sequence[str], final: bool = False, count: int | None = None) -> None:
        """Count a batch of images.

        Args:
            seen: Number of images, including the corrupt ones.
            corrupt: Description of each corrupt image: its position and its fault.
            final: Whether there are no more images.
            count: Number of corrupt images (default: those in ``corrupt``).

        Raises:
            UsageError: Too many images are corrupt.
        """
        self.seen += seen
        self.count += len(corrupt) if count is None else count
        self.first += corrupt[: max(0, NAMED - len(self.first))]
        if self.count > self.max_corrupt * self.seen and (final or self.seen >= self.settled):
            raise UsageError(
                f"{self.count} of {self.seen} images are corrupt, more than max_corrupt {self.max_corrupt} allows; "
                f"the first is {self.first[0]}"
            )

    def named(self) -> str:
        """Return the first corrupt images in one line."""
        return "; ".join(self.first) + (", ..." if self.count > len(self.first) else "")
