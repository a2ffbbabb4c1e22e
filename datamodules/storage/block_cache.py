"""A cache of blocks of remote objects on the node's own disk, shared by all its ranks and workers.

1. An object's name is the SHA-256 of its full URL, size, ETag and block size: equal file names in different folders
   never mix, and an object that has changed gets a new name.
2. ``<cache>/<ab>/<hash>/<number>`` contains one block after a header (magic, CRC-32, length). Truncated or damaged
   blocks are fetched again. There is no fsync: a block torn by a power failure fails its check.
3. A block is written to a temporary file and renamed. A process that misses a block takes a lock and checks again, so
   that a node downloads each block once. Without working locks it may be downloaded twice.
4. Blocks in use are memory maps: processes share their pages, and eviction does not affect readers. A process checks
   the CRC of a file only once, because a shuffle over many blocks maps the same files again and again.
5. Above the cap, the least recently used blocks are evicted. The cache is measured each time a process has written
   1/64 of the cap, so N processes may exceed it by N/64 for a while.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import secrets
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ... import UsageError

BLOCK_BYTES = 4 << 20
DEFAULT_CACHE_BYTES = 32 << 30
CHECKED_BLOCKS = 1 << 16  # enough for 256 GiB
MAPPED_BLOCKS = 128  # each map takes a file descriptor, and processes are often limited to 1,024
HEADER = struct.Struct("<4sIQ")
MAGIC = b"RWB1"
LOCKS = 256  # lock files are never removed, so their number is fixed; blocks may share one


@dataclass
class ReadStats:
    """Counters of remote reads.

    Attributes:
        requests: Requests sent, including failed ones.
        bytes_fetched: Bytes received.
        cache_hits: Blocks found in the cache, in memory or on disk.
        retries: Requests sent again.
        uncached: Blocks that could not be cached, for example because the disk is full.
        damaged: Cached blocks that failed their check and were fetched again.
    """

    requests: int = 0
    bytes_fetched: int = 0
    cache_hits: int = 0
    retries: int = 0
    uncached: int = 0
    damaged: int = 0

    def add(self, **counts: int) -> None:
        """Add to these counters and to those of the process."""
        for stats in {id(self): self, id(TOTAL): TOTAL}.values():
            for name, count in counts.items():
                setattr(stats, name, getattr(stats, name) + count)


TOTAL = ReadStats()


def process_stats() -> dict[str, int]:
    """Return the counters of all remote objects that this process has read."""
    return asdict(TOTAL)


class BlockCache:
    """Cache of blocks by object and number. Instances can be pickled and used after a fork.

    Args:
        folder: Folder of the blocks, created with the first one.
        capacity: Limit in bytes of all blocks together.
        block_bytes: Size of a block in bytes; the last block of an object may be shorter.
    """

    def __init__(self, folder: str | Path, capacity: int = DEFAULT_CACHE_BYTES, block_bytes: int = BLOCK_BYTES) -> None:
        self.folder, self.capacity, self.block_bytes = Path(folder), capacity, block_bytes
        self._mapped: OrderedDict[tuple[str, int], memoryview] = OrderedDict()
        self._checked: OrderedDict[Path, int] = OrderedDict()  # path -> inode of a file whose CRC was right
        self._unmeasured = capacity  # measured before the first write
        self._warned = False

    @classmethod
    def from_environment(cls) -> BlockCache:
        """Return the cache in ``REWURST_CACHE_DIR`` (``~/.cache/rewurst/blocks``) of ``REWURST_CACHE_BYTES`` (32 GiB).

        Raises:
            UsageError: ``REWURST_CACHE_BYTES`` is not a number of bytes.
        """
        folder = os.environ.get("REWURST_CACHE_DIR") or Path("~/.cache/rewurst/blocks").expanduser()
        capacity = os.environ.get("REWURST_CACHE_BYTES") or str(DEFAULT_CACHE_BYTES)
        if not capacity.isdecimal():
            raise UsageError(f"REWURST_CACHE_BYTES is {capacity!r}, expected a number of bytes such as 34359738368")
        return cls.shared(Path(folder), int(capacity), BLOCK_BYTES)

    @classmethod
    def shared(cls, folder: Path, capacity: int, block_bytes: int) -> BlockCache:
        """Return the process's only cache with these settings, so that all objects share its maps."""
        key = (folder, capacity, block_bytes)
        if key not in _shared:
            _shared[key] = cls(*key)
        return _shared[key]

    def object_name(self, url: str, size: int, identity: str) -> str:
        """Return the name of one version of an object, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps([url, size, identity, self.block_bytes]).encode()).hexdigest()

    def block(self, name: str, number: int, length: int, fetch: Callable[[], bytes], stats: ReadStats) -> memoryview:
        """Return a block from memory, from disk or from ``fetch``, which must return ``length`` bytes."""
        found = self._mapped.pop((name, number), None)
        if found is None:
            path = self.folder / name[:2] / name / str(number)
            found = self._load(path, length, stats)
            if found is None:
                with self._lock(f"{int(name[:8], 16) + number:x}"):
                    found = self._load(path, length, stats) or self._store(path, fetch(), stats)
        else:
            stats.add(cache_hits=1)
        self._mapped[name, number] = found
        if len(self._mapped) > MAPPED_BLOCKS:
            with contextlib.suppress(KeyError):  # another thread has emptied the cache
                self._mapped.popitem(last=False)
        return found

    def _load(self, path: Path, length: int, stats: ReadStats) -> memoryview | None:
        try:
            with path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError:
            return None
        except ValueError:  # an empty file
            inode, content = -1, memoryview(b"")
        payload = content[HEADER.size :]
        if not self._is_whole(path, inode, content, length):
            stats.add(damaged=1)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # already evicted, or owned by another user
            os.utime(path)
        stats.add(cache_hits=1)
        return payload

    def _is_whole(self, path: Path, inode: int, content: memoryview, length: int) -> bool:
        if len(content) != HEADER.size + length:
            return False
        magic, crc, stored_length = HEADER.unpack(content[: HEADER.size])
        if magic != MAGIC or stored_length != length:
            return False
        if self._checked.get(path) == inode:
            return True
        if zlib.crc32(content[HEADER.size :]) != crc:
            return False
        self._checked[path] = inode
        if len(self._checked) > CHECKED_BLOCKS:
            with contextlib.suppress(KeyError):
                self._checked.popitem(last=False)
        return True

    def _store(self, path: Path, content: bytes, stats: ReadStats) -> memoryview:
        size = HEADER.size + len(content)
        if size > self.capacity:
            stats.add(uncached=1)
            return memoryview(content)
        try:
            self._make_room(size)
            self._write(path, HEADER.pack(MAGIC, zlib.crc32(content), len(content)), content)
            with path.open("rb") as file:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[HEADER.size :]
        except FileNotFoundError:  # already evicted by another process
            return memoryview(content)
        except (OSError, ValueError) as error:
            stats.add(uncached=1)
            if not self._warned:
                self._warned = True
                reason = getattr(error, "strerror", None) or error
                warnings.warn(
                    f"{self.folder}: cannot cache a block ({reason}); reading continues without", stacklevel=2
                )
            return memoryview(content)

    def _write(self, path: Path, *parts: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _create(temporary)
            try:
                for part in parts:
                    _write_all(descriptor, part)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _make_room(self, size: int) -> None:
        """Evict down to 15/16 of the cap if this block would exceed it."""
        self._unmeasured += size
        if self._unmeasured <= self.capacity // 64:
            return
        with self._lock("eviction"):
            blocks = sorted(self._blocks(), key=lambda block: block[0])
            total = sum(used for _, used, _ in blocks)
            goal = self.capacity - size if total + size <= self.capacity else self.capacity * 15 // 16 - size
            for _, used, path in blocks:
                if total <= goal:
                    break
                with contextlib.suppress(OSError):  # another process removed it first
                    os.unlink(path)
                total -= used
        self._unmeasured = 0

    def _blocks(self) -> Iterator[tuple[int, int, str]]:
        """Yield the time of last use, size and path of every block and every temporary file of a killed process."""
        for folder in self.folder.glob("??/*"):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        yield status.st_mtime_ns, status.st_size, entry.path

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        number = zlib.crc32(name.encode()) % LOCKS
        descriptor = None
        try:
            try:
                locks = self.folder / "locks"
                locks.mkdir(parents=True, exist_ok=True)
                path = locks / ("eviction" if name == "eviction" else f"{number:02x}")
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks, or a read-only or full one: blocks may be fetched twice
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if a fork has copied the descriptor
                os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockCache.shared, (self.folder, self.capacity, self.block_bytes)


_shared: dict[tuple[Path, int, int], BlockCache] = {}


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:  # the folder was removed in the meantime
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o644)


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        written = os.write(descriptor, rest)
        if written <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[written:]
