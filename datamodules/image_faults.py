"""Pictures that cannot be used: counted, bounded, the first ones named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .. import UsageError
from .image_work import Fault

LISTED = 3  # faults that the summary names
ENOUGH = 1000  # pictures after which too many faults end the preparation early


class Faults:
    """Pictures that could not be used: counted, the first of each kind remembered.

    Args:
        max_corrupt: Share that may be corrupt.
        skip_without_caption: Whether pictures without a caption are left out rather than refused.
    """

    def __init__(self, max_corrupt: float, skip_without_caption: bool) -> None:
        self._max_corrupt, self._skip = max_corrupt, skip_without_caption
        self._seen = 0
        self._counts = {"corrupt": 0, "caption": 0}
        self._first: dict[str, list[Fault]] = {"corrupt": [], "caption": []}

    def count(self, seen: int, found: Sequence[Fault]) -> None:
        """Take note of pictures, and of those among them that cannot be used.

        Raises:
            UsageError: One has no caption, or too many are corrupt.
        """
        self._seen += seen
        for fault in found:
            if fault.kind == "caption" and not self._skip:
                raise without_caption(fault)
            self._counts[fault.kind] += 1
            if len(self._first[fault.kind]) < LISTED:
                self._first[fault.kind].append(fault)
        if any(fault.kind == "corrupt" for fault in found):
            self.check()

    def check(self, final: bool = False) -> None:
        """Raise where more are corrupt than may be; before the end only once that is sure enough."""
        corrupt = self._counts["corrupt"]
        if corrupt > self._max_corrupt * self._seen and (final or self._seen >= ENOUGH):
            raise UsageError(
                f"{corrupt} of {self._seen} pictures are corrupt, more than max_corrupt ({self._max_corrupt}) of them; "
                f"the first: {_named(self._first['corrupt'][:1])}"
            )

    def remarks(self) -> Iterator[str]:
        """One line for each kind of fault that there was."""
        for kind, what in (("corrupt", "corrupt pictures"), ("caption", "pictures without a caption")):
            if self._counts[kind]:
                yield f"{self._counts[kind]} {what} left out, the first: {_named(self._first[kind])}"


def _named(faults: Sequence[Fault]) -> str:
    return "; ".join(f"{fault.name} ({fault.reason})" for fault in faults)


def without_caption(fault: Fault) -> UsageError:
    """That a picture needs a caption."""
    return UsageError(f"{fault.name}: no caption; add one, or leave such pictures out: --skip_without_caption")
