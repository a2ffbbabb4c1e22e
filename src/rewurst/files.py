"""Write files whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from . import UsageError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the system while ``path`` is written (disk full, no permission) into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends, whole and on disk, or not at all.

    A process that is killed leaves a hidden file ``.NAME.*.tmp`` next to it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by bytes, or text in UTF-8; others may read it, because a corpus is shared."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        os.fchmod(file.fileno(), 0o644)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk, not only the files' bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
