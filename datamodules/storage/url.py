"""Use remote objects as files: read in sequence, list, write, delete.

Reading sends ranged requests of 8 MiB with the retries of ``remote``. It bypasses the node's cache, because preparation
reads everything once. An object appears only when all of it has been sent, so a killed writer leaves nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit, urlunsplit

from ... import UsageError
from .block_cache import ReadStats
from .random_access import SeekableFile, is_remote, join, local_path, read_whole
from .remote import FSSPEC_ATTEMPTS, file_system, fsspec_errors, open_remote, persistently, shown

READ_BYTES = 8 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Url:
    """A remote object with the methods of ``Path`` that preparation uses; ``str`` hides secrets in the URL.

    Args:
        url: URL of the object.
        below: Path below the folder in which the object was found.
    """

    url: str
    below: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self._path.name

    @property
    def suffix(self) -> str:
        """Last suffix, such as ``.gz``."""
        return self._path.suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes, such as ``[".jsonl", ".gz"]``."""
        return self._path.suffixes

    @property
    def parent(self) -> Url:
        """Folder that contains the object."""
        return Url(self._before_query(lambda url: url.rstrip("/").rpartition("/")[0]), self.below[:-1])

    def with_suffix(self, suffix: str) -> Url:
        """Return the URL with another suffix."""
        url = self._before_query(lambda url: url.removesuffix(self.suffix) + suffix)
        below = (*self.below[:-1], self.below[-1].removesuffix(self.suffix) + suffix) if self.below else ()
        return Url(url, below)

    def __truediv__(self, name: str) -> Url:
        return Url(join(self.url, name))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open the object for reading bytes.

        Raises:
            FileNotFoundError: The object does not exist.
            UsageError: The object cannot be read.
        """
        assert mode == "rb"
        return io.BufferedReader(RemoteFile(self.url), READ_BYTES)

    def read_bytes(self) -> bytes:
        """Return all bytes of the object.

        Raises:
            FileNotFoundError: The object does not exist.
            UsageError: The object cannot be read.
        """
        return read_whole(self.url)

    def is_file(self) -> bool:
        """Return whether the object exists."""
        try:
            self.describe()
        except FileNotFoundError:
            return False
        return True

    def describe(self) -> tuple[int, str]:
        """Return the size, and the ETag or time of the last change.

        Raises:
            FileNotFoundError: The object does not exist.
            UsageError: The object cannot be read.
        """
        remote = open_remote(self.url)
        return persistently(remote.describe, str(self), remote.attempts, ReadStats())

    @property
    def _path(self) -> PurePosixPath:
        parts = urlsplit(self.url)
        return PurePosixPath(parts.path if _is_web(parts) else self.url.partition("://")[2])

    def _before_query(self, change: Callable[[str], str]) -> str:
        """Return the URL with the part before a query changed; outside of http, ? and # are part of a key."""
        parts = urlsplit(self.url)
        if not _is_web(parts):
            return change(self.url)
        return urlunsplit(parts._replace(path=change(parts.path)))


def _is_web(parts: SplitResult) -> bool:
    return parts.scheme.lower() in ("http", "https")


Place = Path | Url
"""A local or remote file."""


def place(name: str) -> Place:
    """Return the file at a path or URL."""
    return Url(name) if is_remote(name) else local_path(name)


def seekable(path: Place) -> Any:
    """Return what readers of columns accept: the path, or the open object."""
    return path.open() if isinstance(path, Url) else path


class RemoteFile(SeekableFile):
    """A remote object as a file that can be read by position.

    Args:
        url: URL of the object.

    Raises:
        FileNotFoundError: The object does not exist.
        UsageError: The object cannot be read, or changes while it is read.
    """

    def __init__(self, url: str) -> None:
        self._remote, self._where = open_remote(url), shown(url)
        size, self._identity = self._persistently(self._remote.describe)
        super().__init__(size)

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer with one ranged request."""
        begin, end = self._position, min(self._position + len(target), self._size)
        if begin >= end:
            return 0
        content = self._persistently(lambda: self._remote.fetch(begin, end, self._size, self._identity))
        target[: len(content)] = content
        self._position = end
        return len(content)

    def _persistently(self, call: Callable[[], T]) -> T:
        return persistently(call, self._where, self._remote.attempts, ReadStats())


def find(url: str) -> list[Url]:
    """Return the objects below a folder, sorted by path; an empty list if there is no such folder.

    Raises:
        UsageError: The server cannot list folders.
    """
    if _is_web(urlsplit(url)):
        raise UsageError(f"{shown(url)}: a folder cannot be listed over http; name its files")
    system = file_system(url)
    try:
        found = _tried(url, lambda: system.find(url))
    except FileNotFoundError:
        return []
    prefix = str(system._strip_protocol(url)).rstrip("/") + "/"
    names = sorted(name.removeprefix(prefix).split("/") for name in found if name.startswith(prefix))
    return [Url(f"{url.rstrip('/')}/{'/'.join(parts)}", tuple(parts)) for parts in names]


def write_object(url: str, content: bytes) -> None:
    """Write an object.

    Raises:
        UsageError: The object cannot be written.
    """
    _tried(url, lambda: file_system(url).pipe_file(url, content))


def upload(file: Path, url: str) -> None:
    """Upload a file as an object.

    Raises:
        UsageError: The object cannot be written.
    """
    _tried(url, lambda: file_system(url).put_file(str(file), url))


def delete(urls: list[str]) -> None:
    """Delete objects.

    Raises:
        UsageError: An object cannot be deleted.
    """
    if urls:
        _tried(urls[0], lambda: file_system(urls[0]).rm(urls))


def refuse_unwritable(url: str) -> None:
    """Raise ``UsageError`` if a URL cannot be written: http, or a protocol whose package is missing."""
    if _is_web(urlsplit(url)):
        raise UsageError(f"{shown(url)}: cannot write over http; give a folder, or s3:// or gs://")
    file_system(url)


def _tried(url: str, call: Callable[[], T]) -> T:
    def once() -> T:
        with fsspec_errors(url):
            return call()

    return persistently(once, shown(url), FSSPEC_ATTEMPTS, ReadStats())
