"""Count images that cannot be used, name the first ones, and stop when their share is too large."""

from __future__ import annotations

from collections.abc import Sequence

from ... import UsageError

NAMED = 3  # images that summaries name; the others are counted


class CorruptImages:
    """Count of corrupt images.

    Args:
        max_corrupt: Share of the images that may be corrupt, in [0, 1].
        settled: Number of images after which their share means something; before that only the end decides.
    """

    def __init__(self, max_corrupt: float, settled: int = 200) -> None:
        self.max_corrupt, self.settled = max_corrupt, settled
        self.seen = self.count = 0
        self.first: list[str] = []

    def add(self, seen: int, corrupt: Sequence[str], final: bool = False, count: int | None = None) -> None:
        """Count a batch of images.

        Args:
            seen: Number of images, the corrupt ones included.
            corrupt: Place of each corrupt one, and what is wrong with it.
            final: Whether there are no more images.
            count: Number of corrupt ones (default: those in ``corrupt``).

        Raises:
            UsageError: Too many are corrupt.
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
