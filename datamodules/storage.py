"""placeholder"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Protocol

from .. import UsageError


class Bytes(Protocol):
    size: int
    identity: str

    def read(self, begin: int, end: int) -> memoryview: ...
    def close(self) -> None: ...


class LocalBytes:
    def __init__(self, path: str) -> None:
        self.path, self.identity = path, ""
        try:
            with open(path, "rb") as f:
                f.seek(0, 2)
                self.size = f.tell()
                self._map = (
                    memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)) if self.size else memoryview(b"")
                )
        except FileNotFoundError:
            raise UsageError(f"{path}: missing") from None
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None

    def read(self, begin: int, end: int) -> memoryview:
        return self._map[begin:end]

    def close(self) -> None:
        pass


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def read_whole(path: str, limit: int = 1 << 30) -> bytes:
    return Path(path).read_bytes()


def open_bytes(path: str) -> Bytes:
    return LocalBytes(path)
