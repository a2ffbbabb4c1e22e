"""Count what text units have lost: corrupt documents, and characters that the tokenizer does not know."""

from __future__ import annotations

import sys

from ..sources.skipped import Skipped
from ..steps.unknown import summary, too_many
from .resumable_units import Record


class Tally:
    """Counts what was lost, and raises when it is too much.

    Args:
        skipped: Counter of documents.
        size: Size of all sources in bytes.
        max_unknown: Share of the text that the tokenizer may not know.
    """

    def __init__(self, skipped: Skipped, size: int, max_unknown: float) -> None:
        self._skipped, self._size, self._max_unknown = skipped, size, max_unknown
        self.tokens = self._unknown = 0
        self._first = ""

    def add(self, record: Record) -> None:
        """Add the record of a part."""
        self._skipped.add(record["skipped"])
        count, first = record["unknown"]
        self.tokens, self._unknown = self.tokens + tokens_of(record), self._unknown + count
        self._first = self._first or first
        self._check(final=False)

    def finish(self) -> None:
        """Check the shares of the whole, and report what is unknown."""
        self._check(final=True)
        if self._unknown:
            print(summary(self._unknown, self.tokens, self._first), file=sys.stderr)

    def _check(self, final: bool) -> None:
        self._skipped.check(self._size, final)
        too_many(self._unknown, self.tokens, self._first, self._max_unknown, final)


def tokens_of(record: Record) -> int:
    """Return the number of tokens of a part."""
    return sum(record["tokens"].values())
