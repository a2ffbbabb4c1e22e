"""The samples of one tar, in sequence: a file, an object on a server, or the output of a command.

webdataset groups the members into samples. What it loses silently is refused, as in an index: a tar that ends early, a
key that comes again, names without an extension, links.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from webdataset import tariterators
from webdataset.gopen import gopen_pipe

from ... import UsageError
from ..corpora.tar import is_left_out
from ..storage.random_access import is_remote, local_path
from ..storage.url import Url
from ..storage.zstd_files import open_zstd

END_BYTES = 1024  # a tar ends with two blocks of zeros
_READ_BYTES = 2**20
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))

TarSample = dict[str, Any]


def is_pipe(url: str) -> bool:
    """Return whether a URL is a command whose output is the tar."""
    return url.lower().startswith("pipe:")


def samples(url: str) -> Iterator[TarSample]:
    """Yield the samples of a tar as webdataset makes them: ``__key__``, and bytes by extension.

    Args:
        url: Path or URL of a tar, compressed or not, or ``pipe:COMMAND``.

    Raises:
        UsageError: It cannot be read to its end, or webdataset would lose a part of it.
    """
    try:
        with _open(url) as stream, _decompressed(stream) as content:
            tail = _Tail(content)
            yield from tariterators.group_by_keys(cast(Iterable[Any], _files(tail, url)))
            tail.finish(url)
    except UsageError:
        raise
    except Exception as error:  # tarfile, gzip, zstd and webdataset have their own, and add the stream to them
        reason = error.strerror if isinstance(error, OSError) and error.strerror else (error.args or [""])[0]
        raise UsageError(f"{url}: cannot be read ({reason or type(error).__name__})") from None


def _files(stream: _Tail, url: str) -> Iterator[dict[str, Any]]:
    seen, key = set[str](), None
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
        for member in tar:
            if member.isdir() or is_left_out(member.name):
                continue
            prefix, suffix = tariterators.base_plus_ext(member.name)
            if not member.isfile():
                raise UsageError(f"{url}: member {member.name!r} is a link or a device; webdataset would skip it")
            if prefix is None or not suffix:
                raise UsageError(f"{url}: member {member.name!r} has no extension; webdataset would skip it")
            if prefix != key and prefix in seen:
                raise UsageError(f"{url}: key {prefix!r} comes again; the files of a sample must be neighbors")
            key = prefix
            seen.add(prefix)
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            if len(content) != member.size:
                raise UsageError(f"{url}: ends within {member.name!r}; copy it again")
            yield {"fname": member.name, "data": content, "__url__": url}
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps the headers of all members


def _open(url: str) -> IO[bytes]:
    if is_pipe(url):
        return cast(IO[bytes], gopen_pipe(url))
    return Url(url).open() if is_remote(url) else local_path(url).open("rb")


def _decompressed(stream: IO[bytes]) -> IO[bytes]:
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(Any, _Raw(stream)))
    start = buffered.peek(6)[:6]
    kind = next((kind for magic, kind in _MAGIC if start.startswith(magic)), "")
    if kind == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
    if kind == "zstd":
        return open_zstd(buffered)
    if kind:
        return cast(IO[bytes], (bz2.BZ2File if kind == "bzip2" else lzma.LZMAFile)(cast(Any, buffered)))
    return buffered


class _Raw(io.RawIOBase):
    """A stream of webdataset's as Python's own classes want it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _Tail:
    """A stream that remembers its last bytes, which say whether the tar is whole."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._last = stream, b""

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._last = content[-END_BYTES:] if len(content) >= END_BYTES else (self._last + content)[-END_BYTES:]
        return content

    def finish(self, url: str) -> None:
        """Read to the end, and raise if the end mark is missing."""
        while self.read(_READ_BYTES):
            pass
        if self._last != bytes(END_BYTES):
            raise UsageError(f"{url}: ends without the mark of a whole tar; copy it again")
