"""What read-only files that are read by position have in common."""

from __future__ import annotations

import io


class SeekableFile(io.RawIOBase):
    """A position in ``size`` bytes; subclasses read from it and move it."""

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to an offset from the beginning, the position or the end, past the end too."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position
