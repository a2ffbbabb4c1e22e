"""Random access to the bytes of a local file or a remote object through one interface.

A local file is mapped into memory. A remote object (http, https, s3, gs) is read in blocks by ranged requests through
the node's block cache; only the blocks needed are fetched. Environment: ``REWURST_CACHE_DIR``,
``REWURST_CACHE_BYTES``, and the variables for credentials and endpoints that ``remote`` describes.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import secrets
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import url2pathname

from ... import UsageError
from .block_cache import BlockCache, ReadStats, process_stats
from .remote import open_remote, persistently, shown

__all__ = ["Bytes", "CachedBytes", "LocalBytes", "is_remote", "join", "open_bytes", "process_stats", "read_whole"]

WHOLE_LIMIT_BYTES = 1 << 28
_scheme = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Bytes(Protocol):
    """Random access to bytes that do not change.

    Attributes:
        size: Size in bytes.
        identity: ETag or time of the last change; ``""`` if neither is known.
    """

    size: int
    identity: str

    def read(self, begin: int, end: int) -> memoryview:
        """Return the bytes of [begin, end), read-only.

        Raises:
            UsageError: The range is outside of the file, or cannot be read.
        """

    def close(self) -> None:
        """Stop reading; slices returned earlier stay valid."""


def is_remote(path: str) -> bool:
    """Return whether ``path`` is a remote URL; ``file://`` is local.

    Raises:
        UsageError: The path is a ``pipe:``, which cannot be read by position.
    """
    if path.lower().startswith("pipe:"):
        raise UsageError(f"{path}: a pipe cannot be read by position; read it in sequence with SequentialShards")
    scheme = _scheme.match(path)
    return scheme is not None and scheme[1].lower() != "file"


def join(folder: str, name: str) -> str:
    """Return the path of ``name`` in ``folder``; a URL's query stays after the name."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    parts = urlsplit(folder)
    if parts.scheme.lower() not in ("http", "https"):  # ? and # are part of a key
        return f"{folder.rstrip('/')}/{name}"
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def read_whole(path_or_url: str, limit: int = WHOLE_LIMIT_BYTES) -> bytes:
    """Return all bytes of a small file.

    Args:
        path_or_url: Path or URL of the file.
        limit: Largest size in bytes.

    Raises:
        FileNotFoundError: The file does not exist.
        UsageError: The file cannot be read, or is larger than ``limit``.
    """
    if is_remote(path_or_url):
        remote = open_remote(path_or_url)
        stats = ReadStats()
        content = persistently(lambda: remote.whole(limit), shown(path_or_url), remote.attempts, stats)
        stats.add(bytes_fetched=len(content))
        return content
    path = local_path(path_or_url)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > limit:
        raise UsageError(f"{path}: more than {limit} bytes, which is too large to be read whole")
    return content


def open_bytes(path_or_url: str, size: int | None = None, cache: BlockCache | None = None) -> Bytes:
    """Open a file or an object for reading by position.

    Args:
        path_or_url: Path or URL to open.
        size: Expected size in bytes, if known.
        cache: Cache for remote objects; by default the one set by the environment.

    Raises:
        UsageError: The file does not exist, cannot be read, or has another size.
    """
    opened: Bytes = CachedBytes(path_or_url, cache) if is_remote(path_or_url) else LocalBytes(local_path(path_or_url))
    if size is not None and opened.size != size:
        opened.close()
        found = f"{opened.size} bytes found, {size} expected"
        raise UsageError(f"{shown(path_or_url)}: {found}; copy or prepare it again")
    return opened


class LocalBytes:
    """A file mapped into memory; pickled by its path.

    Args:
        path: Path of the file, which must not be truncated while it is open.

    Raises:
        UsageError: The file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                self.size, self.identity = status.st_size, str(status.st_mtime_ns)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read ({error.strerror})") from None
        self._view: memoryview | None = memoryview(mapped)

    def read(self, begin: int, end: int) -> memoryview:
        """Return the bytes of [begin, end) without copying."""
        _check_range(str(self.path), begin, end, self.size, self._view is None)
        assert self._view is not None
        return self._view[begin:end]

    def close(self) -> None:
        """Release the map; it lasts as long as slices of it do."""
        self._view = None

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalBytes, (self.path,)


class CachedBytes:
    """A remote object read through the node's block cache; forked and pickled copies send no new request to open it.

    Args:
        url: URL of the object.
        cache: Cache of blocks; by default the process's one set by the environment.

    Attributes:
        stats: Counters of this object, see ``ReadStats``.

    Raises:
        UsageError: The object cannot be read.
    """

    def __init__(self, url: str, cache: BlockCache | None = None) -> None:
        self.url, self.stats = url, ReadStats()
        self._remote = open_remote(url)
        self._cache: BlockCache | None = cache or BlockCache.from_environment()
        try:
            self.size, self.identity = persistently(
                self._remote.describe, shown(url), self._remote.attempts, self.stats
            )
        except FileNotFoundError as error:
            raise UsageError(str(error)) from None
        if not self.identity:
            warnings.warn(
                f"{shown(url)}: the server sends neither ETag nor Last-Modified, so changes cannot be noticed: "
                "its cached blocks are not used again after it is closed",
                stacklevel=2,
            )
        self._name = self._cache.object_name(url, self.size, self.identity or secrets.token_hex(16))

    def read(self, begin: int, end: int) -> memoryview:
        """Return the bytes of [begin, end), not copied if they are in one block."""
        _check_range(shown(self.url), begin, end, self.size, self._cache is None)
        assert self._cache is not None
        if begin == end:
            return memoryview(b"")
        block_bytes = self._cache.block_bytes
        first, last = begin // block_bytes, (end - 1) // block_bytes
        if first == last:
            return self._block(first)[begin - first * block_bytes : end - first * block_bytes]
        joined = b"".join(
            self._block(number)[max(begin - number * block_bytes, 0) : end - number * block_bytes]
            for number in range(first, last + 1)
        )
        return memoryview(joined)

    def close(self) -> None:
        """Stop reading; cached blocks stay for other readers."""
        self._cache = None

    def _block(self, number: int) -> memoryview:
        assert self._cache is not None
        begin = number * self._cache.block_bytes
        end = min(begin + self._cache.block_bytes, self.size)
        return self._cache.block(self._name, number, end - begin, lambda: self._fetch(begin, end), self.stats)

    def _fetch(self, begin: int, end: int) -> bytes:
        where = f"{shown(self.url)}, bytes {begin} to {end}"
        try:
            content = persistently(
                lambda: self._remote.fetch(begin, end, self.size, self.identity),
                where, self._remote.attempts, self.stats,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise UsageError(f"{where}: the object was removed ({error})") from None
        self.stats.add(bytes_fetched=len(content))
        return content

    def counters(self) -> dict[str, int]:
        """Return ``stats`` as numbers to log."""
        return asdict(self.stats)


def local_path(path: str) -> Path:
    """Return the path of a local file, which may be given as ``file://``."""
    return Path(url2pathname(urlsplit(path).path) if path.lower().startswith("file://") else path)


def _check_range(where: str, begin: int, end: int, size: int, closed: bool) -> None:
    if closed:
        raise UsageError(f"{where}, bytes {begin} to {end}: already closed")
    if not 0 <= begin <= end <= size:
        raise UsageError(f"{where}, bytes {begin} to {end}: no such range, the file has {size} bytes")


class SeekableFile(io.RawIOBase):
    """A raw file with a position in ``size`` bytes; subclasses read from the position and move it."""

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the beginning, the position or the end, possibly past the end."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position
