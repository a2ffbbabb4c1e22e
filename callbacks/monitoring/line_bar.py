"""A progress bar for logs: whole lines, and few of them."""

from __future__ import annotations

import sys
import time
from typing import Any, ClassVar

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class LineBar(Tqdm):
    """Writes a line at most every few seconds, all bars of a process together, and one when a bar that stays ends.

    Args:
        seconds: Least time between two lines.
        **kwargs: As tqdm's.
    """

    _written: ClassVar[float] = float("-inf")

    def __init__(self, seconds: float, **kwargs: Any) -> None:
        self._seconds, self._ends = seconds, False
        super().__init__(**kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, if it is time."""
        now = time.monotonic()
        if self.disable or msg == "" or not (self._ends or now - LineBar._written >= self._seconds):
            return
        LineBar._written = now
        self.fp.write(f"{msg or self}\n")
        self.fp.flush()

    def close(self) -> None:
        """Write the last line of a bar that stays."""
        if not self.disable and self.leave:
            self._ends = True
            self.display()
        self.leave = False  # tqdm would write it again
        super().close()


def is_terminal() -> bool:
    """Return whether what is printed is seen as it changes: on a terminal, or in a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules
