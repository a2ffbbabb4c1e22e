"""Objects on a server as files: read in sequence, listed, written, deleted.

Reading goes by ranged requests of 8 MiB, each tried again as ``remote`` does, without the node's cache: what
preparation reads it reads once. An object appears when all of it has been sent, so that a writer that dies leaves none.
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
    """An object on a server, with what preparation asks of a ``Path``; its text hides what may be secret.

    Args:
        url: Where it lies.
        below: Its path below the folder in which it was found.
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
        """Such as ``.gz``."""
        return self._path.suffix

    @property
    def suffixes(self) -> list[str]:
        """Such as ``[".jsonl", ".gz"]``."""
        return self._path.suffixes

    @property
    def parent(self) -> Url:
        """The folder that holds it."""
        return Url(self._before_query(lambda url: url.rstrip("/").rpartition("/")[0]), self.below[:-1])

    def with_suffix(self, suffix: str) -> Url:
        """Its neighbour with another suffix."""
        url = self._before_query(lambda url: url.removesuffix(self.suffix) + suffix)
        below = (*self.below[:-1], self.below[-1].removesuffix(self.suffix) + suffix) if self.below else ()
        return Url(url, below)

    def __truediv__(self, name: str) -> Url:
        return Url(join(self.url, name))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens it for reading bytes.

        Raises:
            FileNotFoundError: There is none.
            UsageError: It cannot be read.
        """
        assert mode == "rb"
        return io.BufferedReader(RemoteFile(self.url), READ_BYTES)

    def read_bytes(self) -> bytes:
        """All of it.

        Raises:
            FileNotFoundError: There is none.
            UsageError: It cannot be read.
        """
        return read_whole(self.url)

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.describe()
        except FileNotFoundError:
            return False
        return True

    def describe(self) -> tuple[int, str]:
        """Size, and ETag or time of the last change.

        Raises:
            FileNotFoundError: There is none.
            UsageError: It cannot be read.
        """
        remote = open_remote(self.url)
        return persistently(remote.describe, str(self), remote.attempts, ReadStats())

    @property
    def _path(self) -> PurePosixPath:
        parts = urlsplit(self.url)
        return PurePosixPath(parts.path if _is_web(parts) else self.url.partition("://")[2])

    def _before_query(self, change: Callable[[str], str]) -> str:
        """The URL with what stands before a query changed; but on the web ? and # are characters of a key."""
        parts = urlsplit(self.url)
        if not _is_web(parts):
            return change(self.url)
        return urlunsplit(parts._replace(path=change(parts.path)))


def _is_web(parts: SplitResult) -> bool:
    return parts.scheme.lower() in ("http", "https")


Place = Path | Url
"""A file here or on a server."""


def place(name: str) -> Place:
    """The file behind a path or URL."""
    return Url(name) if is_remote(name) else local_path(name)


def seekable(path: Place) -> Any:
    """What a reader of columns takes: the path, or the open object."""
    return path.open() if isinstance(path, Url) else path


class RemoteFile(SeekableFile):
    """An object read by position.

    Args:
        url: Where it lies.

    Raises:
        FileNotFoundError: There is none.
        UsageError: It cannot be read, or it changes while it is read.
    """

    def __init__(self, url: str) -> None:
        self._remote, self._where = open_remote(url), shown(url)
        size, self._identity = self._persistently(self._remote.describe)
        super().__init__(size)

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        """One ranged request."""
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
    """The objects below a folder, sorted by their paths; none where there is no such folder.

    Raises:
        UsageError: A server that cannot list.
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
    """Make an object.

    Raises:
        UsageError: It cannot be written.
    """
    _tried(url, lambda: file_system(url).pipe_file(url, content))


def upload(file: Path, url: str) -> None:
    """Make an object of a file.

    Raises:
        UsageError: It cannot be written.
    """
    _tried(url, lambda: file_system(url).put_file(str(file), url))


def delete(urls: list[str]) -> None:
    """Delete objects.

    Raises:
        UsageError: They cannot be deleted.
    """
    if urls:
        _tried(urls[0], lambda: file_system(urls[0]).rm(urls))


def refuse_unwritable(url: str) -> None:
    """Raise where nothing can be written to a URL: http, or a protocol whose package is missing."""
    if _is_web(urlsplit(url)):
        raise UsageError(f"{shown(url)}: nothing can be written over http; give a folder, or s3:// or gs://")
    file_system(url)


def _tried(url: str, call: Callable[[], T]) -> T:
    def once() -> T:
        with fsspec_errors(url):
            return call()

    return persistently(once, shown(url), FSSPEC_ATTEMPTS, ReadStats())
