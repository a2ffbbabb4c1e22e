"""Count what is skipped or repaired while sources are read, name the first, and bound their share."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

from ... import UsageError

NAMED = 3
SETTLED = 200  # documents after which a share means something; before that only the end decides


@dataclass
class Skipped:
    """Counts of what was skipped or repaired while sources were read.

    Attributes:
        max_corrupt: Share of the documents, and of the bytes in damaged files, that may be lost; with 0 the first one
            is an error at once.
        unknown_files: Files of unknown kinds.
        documents: Number of documents, the empty and corrupt ones included.
        empty_documents: Number of documents that are empty or only white space.
        repaired_documents: Number of documents with half a surrogate pair.
        left_out_members: Number of files in tars that belong to no sample, such as ``.DS_Store``.
        corrupt_documents: Number of documents that cannot be used.
        damaged_files: Number of files that cannot be read to their end.
        damaged_bytes: Size of these files.
        first: The first places with something corrupt or damaged.
    """

    max_corrupt: float = 0.0
    unknown_files: list[str] = field(default_factory=list)
    documents: int = 0
    empty_documents: int = 0
    repaired_documents: int = 0
    left_out_members: int = 0
    corrupt_documents: int = 0
    damaged_files: int = 0
    damaged_bytes: int = 0
    first: list[str] = field(default_factory=list)

    def corrupt(self, message: str) -> None:
        """Count a document that cannot be used.

        Raises:
            UsageError: Nothing may be corrupt.
        """
        self._name(message)
        self.documents += 1
        self.corrupt_documents += 1

    def damaged(self, message: str, size: int) -> None:
        """Count a file that cannot be read to its end.

        Args:
            message: File, and what is wrong with it.
            size: Size of the file in bytes.

        Raises:
            UsageError: Nothing may be damaged.
        """
        self._name(message)
        self.damaged_files += 1
        self.damaged_bytes += size

    def _name(self, message: str) -> None:
        if not self.max_corrupt:
            raise UsageError(message)
        if len(self.first) < NAMED:
            self.first.append(message)

    def take(self) -> dict[str, Any]:
        """Return what was counted while files were read, as JSON, and start from zero."""
        counts = asdict(self)
        for name in ("max_corrupt", "unknown_files"):
            del counts[name]
        for name, value in counts.items():
            setattr(self, name, type(value)())
        return counts

    def add(self, counts: dict[str, Any]) -> None:
        """Add what :meth:`take` returned."""
        for name, value in counts.items():
            setattr(self, name, getattr(self, name) + value)
        del self.first[NAMED:]

    def check(self, total_bytes: int, final: bool) -> None:
        """Raise if too much was lost.

        Args:
            total_bytes: Size of all files.
            final: Whether there are no more documents.

        Raises:
            UsageError: Too many documents are corrupt, or too many bytes are in damaged files.
        """
        if self.damaged_bytes > self.max_corrupt * total_bytes:
            raise UsageError(
                f"{self.damaged_bytes} of {total_bytes} bytes are in damaged files, more than max_corrupt "
                f"{self.max_corrupt} allows; the first: {self.first[0]}"
            )
        settled = final or self.documents >= SETTLED
        if settled and self.corrupt_documents > self.max_corrupt * self.documents:
            raise UsageError(
                f"{self.corrupt_documents} of {self.documents} documents are corrupt, more than max_corrupt "
                f"{self.max_corrupt} allows; the first: {self.first[0]}"
            )

    def report(self) -> str:
        """Return one line for the summary, empty if nothing was skipped."""
        parts = []
        if self.unknown_files:
            kinds = Counter(PurePath(name).suffix or PurePath(name).name for name in self.unknown_files)
            of = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(5))
            parts.append(
                f"{len(self.unknown_files)} files of unknown kind, or links to folders, skipped "
                f"(the first: {self.unknown_files[0]}; {of})"
            )
        if self.empty_documents:
            parts.append(f"{self.empty_documents} empty documents skipped")
        if self.repaired_documents:
            parts.append(f"{self.repaired_documents} documents with half a surrogate pair, replaced by U+FFFD")
        if self.left_out_members:
            parts.append(f"{self.left_out_members} files of tars that belong to no sample skipped")
        if self.corrupt_documents:
            parts.append(f"{self.corrupt_documents} of {self.documents} documents are corrupt and skipped")
        if self.damaged_files:
            parts.append(f"{self.damaged_files} files are damaged and read as far as possible")
        if self.first:
            parts.append(f"the first: {' | '.join(self.first)}")
        return "; ".join(parts)
