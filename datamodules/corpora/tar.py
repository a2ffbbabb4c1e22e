"""Scan a tar's headers once and group its bytes into samples as webdataset does.

What webdataset would lose silently is an error here: a truncated tar, a key that occurs twice, names without an
extension, and links.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from ... import UsageError
from ..storage.random_access import Bytes, SeekableFile

BLOCK_BYTES = 512
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's: the key ends at the first dot of the file name
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own metadata
# Files that file managers leave behind; webdataset skips names that begin with a dot.
_CLUTTER = re.compile(r"(^|.*/)(\.[^/]*|Thumbs\.db|desktop\.ini)$|(^|.*/)__MACOSX/", re.IGNORECASE)


@dataclass(frozen=True)
class Member:
    """One file of a sample: its extension in lower case, and the offset and size of its content in bytes."""

    extension: str
    begin: int
    size: int


@dataclass(frozen=True)
class Sample:
    """Neighboring files that share a key.

    Attributes:
        key: Common part of their names, including folders.
        members: Files of the sample.
        begin: Offset of the first header, in bytes.
        end: Offset of the next sample or of the end of the tar, in bytes.
    """

    key: str
    members: tuple[Member, ...]
    begin: int
    end: int


class BytesFile(SeekableFile):
    """A read-only file object over :class:`.random_access.Bytes`."""

    def __init__(self, content: Bytes) -> None:
        super().__init__(content.size)
        self._content = content

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer with as much content as is left."""
        begin = min(self._position, self._content.size)
        end = min(begin + len(buffer), self._content.size)
        buffer[: end - begin] = self._content.read(begin, end)
        self._position = end
        return end - begin


def is_left_out(name: str) -> bool:
    """Return whether a member belongs to no sample: webdataset's metadata and files left by file managers."""
    return bool(_META.match(name) or _CLUTTER.match(name))


def scan(content: Bytes, where: str, left_out: list[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of a tar in order.

    Args:
        content: Bytes of the tar.
        where: Path of the tar for messages.
        left_out: List to which the names of members that belong to no sample are added, such as ``.DS_Store``.

    Raises:
        UsageError: The content is not a tar, is truncated or has no samples; a key occurs twice; a name has no
            extension; a member is not a regular file. The message contains the offset.
    """
    if not content.size:
        raise UsageError(f"{where}: empty, expected a tar")
    seen: dict[str, set[str]] = {}
    key, members, begin = "", dict[str, Member](), 0
    end = 0
    for name, offset, member in _members(content, where, [] if left_out is None else left_out):
        match = _NAME.match(name)
        if match is None:
            raise UsageError(f"{where}: member {name!r} at byte {offset} has no extension; webdataset would skip it")
        extension = match[2].lower()
        if match[1] != key or not members:
            if members:
                yield Sample(key, tuple(members.values()), begin, offset)
            key, members, begin = match[1], {}, offset
            if key in seen:
                raise _comes_again(where, key, offset, twice=extension in seen[key])
            seen[key] = set()
        if extension in members:
            raise UsageError(f"{where}: member {name!r} at byte {offset} occurs twice; webdataset cannot read it")
        members[extension] = Member(extension, *member)
        seen[key].add(extension)
        end = offset_after(*member)
    if not members:
        raise UsageError(f"{where}: contains no samples")
    yield Sample(key, tuple(members.values()), begin, end)


def _comes_again(where: str, key: str, offset: int, twice: bool) -> UsageError:
    again = f"{where}: key {key!r} at byte {offset} occurs again"
    if twice:
        return UsageError(f"{again}; rename one of the samples")
    return UsageError(
        f"{again}: the files of a sample must be neighbors, or webdataset splits them; make the tar again with "
        "`tar --sort=name`"
    )


def offset_after(begin: int, size: int) -> int:
    """Return the offset in bytes of the header after a member whose content begins at ``begin``."""
    return begin + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _members(content: Bytes, where: str, left_out: list[str]) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """Yield the name, offset of the first header, and begin and size of the content of every file of a sample."""
    end = 0
    try:
        with tarfile.open(fileobj=BytesFile(content), mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                end = offset_after(info.offset_data, info.size)
                if info.isdir() or is_left_out(info.name):
                    left_out += [info.name] if _CLUTTER.match(info.name) and not info.isdir() else []
                    continue
                if not info.isreg():
                    raise UsageError(f"{where}: member {info.name!r} at byte {info.offset} is not a regular file")
                if info.offset_data + info.size > content.size:
                    missing = info.offset_data + info.size - content.size
                    raise UsageError(
                        f"{where}: truncated in {info.name!r} at byte {info.offset}: {missing} bytes are missing"
                    )
                yield info.name, info.offset, (info.offset_data, info.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise UsageError(f"{where}: not a readable tar at byte {end} ({error}); copy it again") from None
    _check_end(content, end, where)


def _check_end(content: Bytes, end: int, where: str) -> None:
    """Raise unless a tar ends in two blocks of zeros; tarfile takes a truncated or damaged header for the end."""
    rest = bytes(content.read(min(end, content.size), min(end + 2 * BLOCK_BYTES, content.size)))
    if any(rest):
        state = "truncated in a header" if len(rest) < BLOCK_BYTES else "no readable header"
        raise UsageError(f"{where}: {state} at byte {end}; copy it again")
    if len(rest) < 2 * BLOCK_BYTES:
        raise UsageError(f"{where}: ends at byte {content.size} without the two zero blocks of a tar; copy it again")


CHUNK_BYTES = 1 << 22


def sha256_of(content: Bytes) -> str:
    """Return the SHA-256 of the content as hexadecimal digits."""
    digest = hashlib.sha256()
    for begin in range(0, content.size, CHUNK_BYTES):
        digest.update(content.read(begin, min(begin + CHUNK_BYTES, content.size)))
    return digest.hexdigest()
