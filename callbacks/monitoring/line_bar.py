"""Progress bar for log files, which writes a few whole lines."""

from __future__ import annotations

import sys
import time
from typing import Any, ClassVar

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class LineBar(Tqdm):
    """Progress bar that writes a line at most every few seconds per process, and one when a permanent bar ends.

    Args:
        seconds: Minimum time between two lines in seconds.
        **kwargs: Arguments of tqdm.
    """

    _written: ClassVar[float] = float("-inf")

    def __init__(self, seconds: float, **kwargs: Any) -> None:
        self._seconds, self._ends = seconds, False
        super().__init__(**kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line if enough time has passed."""
        now = time.monotonic()
        if self.disable or msg == "" or not (self._ends or now - LineBar._written >= self._seconds):
            return
        LineBar._written = now
        self.fp.write(f"{msg or self}\n")
        self.fp.flush()

    def close(self) -> None:
        """Write the last line of a permanent bar."""
        if not self.disable and self.leave:
            self._ends = True
            self.display()
        self.leave = False  # else tqdm writes it again
        super().close()


def is_terminal() -> bool:
    """Return whether output can be updated in place, as on a terminal or in a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules
