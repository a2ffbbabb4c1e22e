"""Checksums of torch's files. torch writes a CRC-32 for every member of its zip archive, but does not check it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from .. import UsageError

SKIP = "REWURST_SKIP_CHECKSUMS"
_intact: set[tuple[str, int, int]] = set()  # path, time and size of the files that this process has checked


def check_file(path: Path) -> None:
    """Raise if a file that torch wrote has changed since; at disk speed, and once per process.

    The environment variable ``REWURST_SKIP_CHECKSUMS=1`` turns it off. Files that are not zip archives have no
    checksums and are not checked.

    Raises:
        UsageError: A member's content does not match its checksum.
    """
    status = path.stat()
    state = str(path.resolve()), status.st_mtime_ns, status.st_size
    if state in _intact or os.environ.get(SKIP, "0") not in ("", "0") or not zipfile.is_zipfile(path):
        return
    if (member := damaged_member(path)) is not None:
        raise UsageError(f"{path} is damaged: {member} does not match its checksum; use another copy or checkpoint")
    _intact.add(state)


def damaged_member(path: Path) -> str | None:
    """Return the first member of a zip archive that is damaged, None if there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, UnicodeDecodeError, OSError):
        return "its directory"
