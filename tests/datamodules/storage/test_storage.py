"""Reading by position: the same bytes as the file, from disk, http and S3, whatever the server and the cache do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranges
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.datamodules.storage import block_cache, remote
from rewurst.datamodules.storage import random_access as storage
from rewurst.datamodules.storage.block_cache import BlockCache, ReadStats
from rewurst.datamodules.storage.random_access import CachedBytes, LocalBytes, is_remote, join, open_bytes, read_whole

CONTENT = np.random.default_rng(0).bytes(10_000)
BLOCK = 1024


@pytest.fixture
def server(loopback: Any) -> Any:
    """An http server with two objects."""
    loopback.behaviour.objects |= {"/a/x.tar": CONTENT, "/empty": b""}
    return loopback


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that would have been made."""
    made: list[float] = []
    monkeypatch.setattr(remote, "sleep", made.append)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "cache", block_bytes=BLOCK)


def blocks(cache: BlockCache) -> list[Path]:
    return [path for path in cache.folder.glob("??/*/*") if path.is_file()]


def local(tmp_path: Path, content: bytes = CONTENT) -> Path:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    return path


# Paths


@pytest.mark.parametrize(
    ("path", "expected"),
    [("s3://b/k", True), ("http://h/k", True), ("file:///k", False), ("/a/b", False), ("a:b", False), ("C:\\x", False)],
)
def test_what_is_remote(path: str, expected: bool) -> None:
    assert is_remote(path) is expected


def test_a_pipe_is_refused() -> None:
    with pytest.raises(UsageError, match="pipe:cat x: a pipe cannot be read by position"):
        open_bytes("pipe:cat x")


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [
        ("/a/b", "c.tar", "/a/b/c.tar"),
        ("file:///a", "c.tar", "file:///a/c.tar"),
        ("s3://bucket/k/", "c#1.tar", "s3://bucket/k/c#1.tar"),
        ("https://h/k?sig=a/b", "c d.tar", "https://h/k/c%20d.tar?sig=a/b"),
    ],
)
def test_join(folder: str, name: str, expected: str) -> None:
    assert join(folder, name) == expected


# Files


def test_a_file_is_mapped_not_copied(tmp_path: Path) -> None:
    opened = open_bytes(str(local(tmp_path)), size=len(CONTENT))
    part = opened.read(10, 5000)
    assert part.readonly
    assert part == CONTENT[10:5000]
    assert np.frombuffer(part, np.uint8).ctypes.data == np.frombuffer(opened.read(0, 1), np.uint8).ctypes.data + 10
    opened.close()
    assert part == CONTENT[10:5000]
    with pytest.raises(UsageError, match="already closed"):
        opened.read(0, 1)


def test_files_by_url_empty_ones_and_copies_by_pickle(tmp_path: Path) -> None:
    path = local(tmp_path)
    assert open_bytes(path.as_uri()).read(3, 9) == CONTENT[3:9]
    assert pickle.loads(pickle.dumps(LocalBytes(path))).read(3, 9) == CONTENT[3:9]
    path.write_bytes(b"")
    empty = open_bytes(str(path))
    assert (empty.size, bytes(empty.read(0, 0))) == (0, b"")


@pytest.mark.parametrize(("begin", "end"), [(-1, 3), (5, 4), (0, len(CONTENT) + 1)])
def test_ranges_that_are_not_there(tmp_path: Path, server: Any, cache: BlockCache, begin: int, end: int) -> None:
    for opened in (open_bytes(str(local(tmp_path))), open_bytes(server.url(), cache=cache)):
        with pytest.raises(UsageError, match=rf"x.tar, bytes {begin} to {end}: no such range, it has 10000 bytes"):
            opened.read(begin, end)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.tar: cannot be read \(No such file"):
        open_bytes(str(tmp_path / "none.tar"))
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        open_bytes(str(tmp_path))
    with pytest.raises(UsageError, match=r"x.tar: 10000 bytes found, 3 expected"):
        open_bytes(str(local(tmp_path)), size=3)
    with pytest.raises(FileNotFoundError, match=r"none: no such file"):
        read_whole(str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"x.tar: more than 9 bytes"):
        read_whole(str(local(tmp_path)), limit=9)


# http


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranges=st.lists(st.tuples(st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT))), max_size=8),
    block_bytes=st.sampled_from([7, 1000, 1 << 20]),
    capacity=st.sampled_from([0, 2500, 1 << 30]),
    fresh=st.booleans(),
)
def test_any_ranges_are_those_of_the_file(
    server: Any,
    tmp_path_factory: pytest.TempPathFactory,
    ranges: list[tuple[int, int]],
    block_bytes: int,
    capacity: int,
    fresh: bool,
) -> None:
    ranges = [(begin, min(end, begin + 40 * block_bytes)) for begin, end in ranges if begin <= end]
    cache = BlockCache(tmp_path_factory.mktemp("any"), capacity, block_bytes)
    opened = CachedBytes(server.url(), cache)
    for begin, end in ranges:
        assert opened.read(begin, end) == CONTENT[begin:end]
        if fresh:  # from disk instead of memory
            cache._mapped.clear()
    assert sum(path.stat().st_size for path in blocks(cache)) <= capacity


def test_only_blocks_that_are_asked_for_are_fetched_and_once(server: Any, cache: BlockCache) -> None:
    opened = CachedBytes(server.url(), cache)
    assert (opened.size, opened.identity) == (len(CONTENT), '"one"')
    for _ in range(3):
        assert opened.read(1500, 2100) == CONTENT[1500:2100]
    assert server.behaviour.ranges == ["bytes=0-0", "bytes=1024-2047", "bytes=2048-3071"]
    assert opened.counters() == {
        "requests": 3, "bytes_fetched": 2 * BLOCK, "cache_hits": 4, "retries": 0, "uncached": 0, "damaged": 0,
    }  # fmt: skip
    assert opened.read(9990, 10_000) == CONTENT[9990:]
    assert server.behaviour.ranges[-1] == "bytes=9216-9999"


def test_another_process_finds_the_blocks(server: Any, cache: BlockCache) -> None:
    CachedBytes(server.url(), cache).read(0, 3000)
    server.behaviour.ranges.clear()
    other = CachedBytes(server.url(), BlockCache(cache.folder, block_bytes=BLOCK))
    assert other.read(0, 3000) == CONTENT[:3000]
    assert (server.behaviour.ranges, other.stats.cache_hits) == (["bytes=0-0"], 3)


def test_equal_names_in_other_folders_and_changed_objects_do_not_mix(server: Any, cache: BlockCache) -> None:
    server.behaviour.objects["/b/x.tar"] = CONTENT[::-1]
    assert CachedBytes(server.url("/a/x.tar"), cache).read(0, 9) == CONTENT[:9]
    assert CachedBytes(server.url("/b/x.tar"), cache).read(0, 9) == CONTENT[::-1][:9]
    server.behaviour.objects["/a/x.tar"], server.behaviour.etag = CONTENT[1:] + b"!", '"two"'
    assert CachedBytes(server.url("/a/x.tar"), cache).read(0, 9) == CONTENT[1:10]
    server.behaviour.objects["/a/x.tar"] = CONTENT[2:]  # with the same ETag
    assert CachedBytes(server.url("/a/x.tar"), cache).read(0, 9) == CONTENT[2:11]


def test_an_object_that_changes_under_its_reader(server: Any, cache: BlockCache) -> None:
    opened = CachedBytes(server.url(), cache)
    server.behaviour.etag = '"two"'
    with pytest.raises(UsageError, match=r"/a/x.tar, bytes 0 to 1024: the object has changed while it was read"):
        opened.read(0, 9)
    del server.behaviour.objects["/a/x.tar"]
    with pytest.raises(UsageError, match=r"/a/x.tar, bytes 0 to 1024: the object has gone .*status 404"):
        opened.read(0, 9)


def test_without_an_etag_blocks_are_not_used_at_the_next_opening(server: Any, cache: BlockCache) -> None:
    server.behaviour.etag = ""
    with pytest.warns(UserWarning, match="neither ETag nor Last-Modified"):
        assert CachedBytes(server.url(), cache).read(0, 9) == CONTENT[:9]
    server.behaviour.objects["/a/x.tar"] = CONTENT[::-1]
    with pytest.warns(UserWarning, match="neither ETag nor Last-Modified"):
        assert CachedBytes(server.url(), cache).read(0, 9) == CONTENT[::-1][:9]


@pytest.mark.parametrize("failures", [[500, 500, 500], [503, 0, 429], [0, 0, 0]])
def test_a_server_that_fails_three_times_and_then_answers(
    server: Any, cache: BlockCache, pauses: list[float], failures: list[int]
) -> None:
    opened = CachedBytes(server.url(), cache)
    server.behaviour.failures = list(failures)
    assert opened.read(0, 9) == CONTENT[:9]
    assert (opened.stats.retries, opened.stats.requests) == (3, 5)
    assert [0.5 <= pause / longest <= 1 for pause, longest in zip(pauses, [0.5, 1, 2], strict=True)] == [True] * 3


def test_pauses_follow_the_server_and_disturb_no_generator(server: Any, cache: BlockCache, pauses: list[float]) -> None:
    import random

    state = random.getstate()
    server.behaviour.failures, server.behaviour.retry_after = [429, 429], "7"
    CachedBytes(server.url(), cache)
    assert pauses == [7.0, 7.0]
    assert random.getstate() == state


def test_a_server_that_never_answers_is_one_line(server: Any, cache: BlockCache, pauses: list[float]) -> None:
    server.behaviour.failures = [500] * 6
    with pytest.raises(UsageError, match=r"^http://127.0.0.1:\d+/a/x.tar: status 500 Internal Server Error, 6 times$"):
        CachedBytes(server.url(), cache)
    assert len(pauses) == 5
    opened = CachedBytes(server.url(), cache)
    server.behaviour.failures = [0] * 6
    with pytest.raises(UsageError, match=r"/a/x.tar, bytes 1024 to 2048: .*, 6 times$"):
        opened.read(1030, 1040)
    server.stop()
    with pytest.raises(UsageError, match=r"x.tar, bytes 0 to 1024: .*Connection refused, 6 times"):
        opened.read(0, 1)
    server.__init__()  # type: ignore[misc]  # the fixture stops it once more


@pytest.mark.parametrize("status", [401, 403, 404])
def test_permanent_failures_end_at_once(server: Any, cache: BlockCache, pauses: list[float], status: int) -> None:
    server.behaviour.failures = [status]
    with pytest.raises(UsageError, match=rf"^http://127.0.0.1:\d+/a/x.tar: status {status}") as error:
        CachedBytes(server.url("/a/x.tar?signature=secret"), cache)
    assert "secret" not in str(error.value)
    assert (pauses, len(server.behaviour.ranges)) == ([], 1)


def test_a_server_that_ignores_ranges(server: Any, cache: BlockCache, tmp_path: Path) -> None:
    server.behaviour.ignores_range = True
    opened = CachedBytes(server.url(), cache)
    with pytest.raises(UsageError, match=r"bytes 1024 to 2048: the server ignores ranges \(200 with all of it\); copy"):
        opened.read(1500, 1600)
    small = CachedBytes(server.url(), BlockCache(tmp_path / "large", block_bytes=1 << 20))
    assert small.read(1500, 1600) == CONTENT[1500:1600]  # all of it was needed anyway


def test_a_server_that_answers_another_range_or_too_little(server: Any, cache: BlockCache, pauses: list[float]) -> None:
    opened = CachedBytes(server.url(), cache)
    server.behaviour.shift = 1
    with pytest.raises(UsageError, match=r"Content-Range 'bytes 1-1024/10000', expected 'bytes 0-1023/10000'"):
        opened.read(0, 9)
    server.behaviour.shift, server.behaviour.cut = 0, 5
    with pytest.raises(UsageError, match=r"bytes 0 to 1024: (1019 bytes came, 1024 expected|.*), 6 times"):
        opened.read(0, 9)
    assert blocks(cache) == []


def test_sizes_that_differ_from_the_index(server: Any, cache: BlockCache) -> None:
    with pytest.raises(UsageError, match=r"/a/x.tar: 10000 bytes found, 9999 expected; copy or prepare it again"):
        open_bytes(server.url(), size=9999, cache=cache)
    assert open_bytes(server.url("/empty"), size=0, cache=cache).read(0, 0) == b""


def test_whole_objects(server: Any, pauses: list[float]) -> None:
    server.behaviour.failures = [502]
    assert read_whole(server.url()) == CONTENT
    assert read_whole(server.url("/empty")) == b""
    with pytest.raises(FileNotFoundError, match=r"/none: status 404"):
        read_whole(server.url("/none"))
    with pytest.raises(UsageError, match=r"x.tar: more than 100 bytes"):
        read_whole(server.url(), limit=100)
    server.behaviour.failures = [403]
    with pytest.raises(UsageError, match=r"x.tar: status 403"):
        read_whole(server.url())


def test_credentials_go_to_the_host_they_are_for(server: Any, cache: BlockCache) -> None:
    server.behaviour.redirect = server.url("/a/x.tar")
    opened = CachedBytes(server.url("/moved").replace("//", "//me:p%40ss@"), cache)
    assert opened.read(0, 9) == CONTENT[:9]
    assert server.behaviour.credentials == ["Basic bWU6cEBzcw==", ""] * 2
    assert server.behaviour.ranges == ["bytes=0-0"] * 2 + ["bytes=0-1023"] * 2  # which a redirect keeps
    with pytest.raises(UsageError, match=r"^http://127.0.0.1:\d+/none: status 404") as error:
        CachedBytes(server.url("/none").replace("//", "//me:secret@"), cache)
    assert "secret" not in str(error.value)
    with pytest.raises(UsageError, match=r"^http://h:port/x: no valid address$"):
        read_whole("http://h:port/x")


# fsspec without a server


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's file system in memory, with an ETag."""
    import fsspec

    monkeypatch.setattr(remote, "_file_systems", {})
    system = remote.file_system("memory://x")
    info = system.info
    monkeypatch.setattr(system, "info", lambda url: {**info(url), "ETag": "one"})
    system.pipe("/a/x.tar", CONTENT)
    system.pipe("/empty", b"")
    yield system
    fsspec.filesystem("memory").store.clear()


def test_any_file_system_of_fsspec(memory: Any, cache: BlockCache) -> None:
    opened = open_bytes("memory://a/x.tar", size=len(CONTENT), cache=cache)
    assert opened.identity == "one"
    for begin, end in [(0, 10), (1000, 5000), (9999, 10_000)]:
        assert opened.read(begin, end) == CONTENT[begin:end]
    assert len(blocks(cache)) == 6
    assert read_whole("memory://a/x.tar") == CONTENT
    assert read_whole("memory://empty") == b""
    with pytest.raises(UsageError, match=r"memory://a/x.tar: 10000 bytes, which is too large"):
        read_whole("memory://a/x.tar", limit=10)
    for path in ("none", "a"):
        with pytest.raises(UsageError, match=rf"^memory://{path}: no such object$"):
            open_bytes(f"memory://{path}", cache=cache)


class HTTPClientError(Exception):
    """As botocore's, which is no OSError."""


@pytest.mark.parametrize(
    ("error", "message", "requests"),
    [
        (TimeoutError(), "x.tar, bytes 0 to 1024: TimeoutError, 2 times", 2),
        (OSError(5, "SlowDown"), r"x.tar, bytes 0 to 1024: \[Errno 5\] SlowDown, 2 times", 2),
        (HTTPClientError("closed"), "x.tar, bytes 0 to 1024: closed, 2 times", 2),
        (PermissionError("Access\nDenied"), "^memory://a/x.tar: Access Denied$", 1),
        (RuntimeError("Unable to locate credentials"), "^memory://a/x.tar: Unable to locate credentials$", 1),
        (FileNotFoundError(), "x.tar, bytes 0 to 1024: the object has gone", 1),
    ],
)
def test_what_file_systems_raise(
    memory: Any, cache: BlockCache, pauses: list[float], monkeypatch: pytest.MonkeyPatch,
    error: Exception, message: str, requests: int,
) -> None:  # fmt: skip
    opened = CachedBytes("memory://a/x.tar", cache)

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(memory, "cat_file", fails)
    with pytest.raises(UsageError, match=message):
        opened.read(0, 9)
    assert (opened.stats.requests, len(pauses)) == (1 + requests, requests - 1)


# Processes


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_and_download_each_block_once(server: Any, cache: BlockCache, method: str) -> None:
    opened = CachedBytes(server.url(), cache)
    opened.read(0, 1)
    loader = DataLoader(ranges.Ranges(opened), batch_size=None, num_workers=2, multiprocessing_context=method)
    assert b"".join(loader) == CONTENT
    fetched = server.behaviour.ranges
    assert len(fetched) == len(set(fetched)) == 11  # the size and ten blocks


def test_a_copy_by_pickle_reads_without_asking_again(server: Any, cache: BlockCache) -> None:
    opened = CachedBytes(server.url(), cache)
    copies = [pickle.loads(pickle.dumps(opened)) for _ in range(2)]
    assert copies[0]._cache is copies[1]._cache
    assert copies[0].read(5, 2000) == CONTENT[5:2000]
    assert server.behaviour.ranges == ["bytes=0-0", "bytes=0-1023", "bytes=1024-2047"]


def _hammer(url: str, folder: Path, capacity: int, seed: int, outcome: Any) -> None:
    random = np.random.default_rng(seed)
    cache = BlockCache(folder, capacity, BLOCK)
    opened = CachedBytes(url, cache)
    wrong = 0
    for begin in random.integers(0, len(CONTENT) - 100, 150).tolist():
        wrong += opened.read(begin, begin + 100) != CONTENT[begin : begin + 100]
        cache._mapped.clear()
    outcome.put((wrong, opened.stats.uncached, opened.stats.damaged))


@pytest.mark.parametrize("capacity", [1 << 30, 3 * (BLOCK + 16)])
def test_processes_that_write_and_evict_at_once(server: Any, tmp_path: Path, capacity: int) -> None:
    context = multiprocessing.get_context("fork")
    outcome = context.Queue()
    processes = [
        context.Process(target=_hammer, args=(server.url(), tmp_path, capacity, seed, outcome)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    outcomes = [outcome.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert outcomes == [(0, 0, 0)] * 3
    assert not list(tmp_path.glob("??/*/.*"))
    fetched = server.behaviour.ranges
    if capacity == 1 << 30:
        assert len(fetched) == 3 + 10


# The cache


def fetched(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def test_what_was_longest_unused_goes_first(tmp_path: Path) -> None:
    cache, stats = BlockCache(tmp_path, capacity=4 * (100 + 16), block_bytes=100), ReadStats()
    for number in range(4):
        cache.block("ab" * 32, number, 100, fetched(bytes([number]) * 100), stats)
        os.utime(tmp_path / "ab" / ("ab" * 32) / str(number), ns=(number, number))
    cache._mapped.clear()
    cache.block("ab" * 32, 0, 100, pytest.fail, stats)  # used, and so the youngest
    cache.block("ab" * 32, 4, 100, fetched(b"4" * 100), stats)
    kept = {path.name for path in blocks(cache)}
    assert {"0", "4"} <= kept
    assert "1" not in kept
    assert sum(path.stat().st_size for path in blocks(cache)) <= cache.capacity


def test_an_evicted_block_stays_readable(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, block_bytes=100)
    view = cache.block("ab" * 32, 0, 100, fetched(b"x" * 100), ReadStats())
    blocks(cache)[0].unlink()
    assert view == b"x" * 100


def test_what_a_killed_process_left_counts_and_goes(tmp_path: Path) -> None:
    cache, name = BlockCache(tmp_path, capacity=500, block_bytes=100), "ab" * 32
    (tmp_path / "ab" / name).mkdir(parents=True)
    left = tmp_path / "ab" / name / ".7.0123456789abcdef"
    left.write_bytes(b"x" * 450)
    os.utime(left, (1, 1))
    cache.block(name, 0, 100, fetched(b"x" * 100), ReadStats())
    assert not left.exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, 500),
        lambda path: os.truncate(path, 5),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(path.read_bytes() + b"!"),
        lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    ],
)
def test_a_damaged_block_is_fetched_again(server: Any, cache: BlockCache, damage: Callable[[Path], None]) -> None:
    CachedBytes(server.url(), cache).read(0, 100)
    damage(blocks(cache)[0])
    for damaged, requests in ((1, 2), (0, 1)):
        opened = CachedBytes(server.url(), BlockCache(cache.folder, block_bytes=BLOCK))
        assert opened.read(0, 100) == CONTENT[:100]
        assert (opened.stats.damaged, opened.stats.requests) == (damaged, requests)


def test_a_process_checks_a_block_once(server: Any, cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    CachedBytes(server.url(), cache).read(0, 100)
    fresh = BlockCache(cache.folder, block_bytes=BLOCK)
    opened, lengths, crc32 = CachedBytes(server.url(), fresh), [], block_cache.zlib.crc32
    monkeypatch.setattr(block_cache.zlib, "crc32", lambda content: lengths.append(len(content)) or crc32(content))
    for _ in range(3):
        assert opened.read(0, 100) == CONTENT[:100]
        fresh._mapped.clear()
    assert lengths == [BLOCK]
    blocks(cache)[0].unlink()  # evicted, and then written by another process
    CachedBytes(server.url(), BlockCache(cache.folder, block_bytes=BLOCK)).read(0, 100)
    lengths.clear()
    flip(blocks(cache)[0])
    os.link(blocks(cache)[0], cache.folder / "kept")  # so that its inode is not used again
    os.replace(shutil.copy(cache.folder / "kept", cache.folder / "copy"), blocks(cache)[0])
    assert opened.read(0, 100) == CONTENT[:100]
    assert opened.stats.damaged == 1


def no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_counted_and_told_once(server: Any, cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache.os, "write", no_space)
    opened = CachedBytes(server.url(), cache)
    with pytest.warns(UserWarning, match=r"cannot cache a block \(No space left on device\); reading goes") as told:
        assert opened.read(0, 10_000) == CONTENT
    assert (len(told), opened.stats.uncached) == (1, 10)
    assert not list(cache.folder.glob("??/*/.*"))


def test_a_limit_on_file_sizes_is_a_full_disk_too(server: Any, cache: BlockCache) -> None:
    opened = CachedBytes(server.url(), cache)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.warns(UserWarning, match=r"cannot cache a block \(File too large\)"):
            assert opened.read(0, 3000) == CONTENT[:3000]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert blocks(cache) == []
    assert opened.read(5000, 5100) == CONTENT[5000:5100]
    assert len(blocks(cache)) == 1


def test_a_cache_that_cannot_be_written_or_locked(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    opened = CachedBytes(server.url(), BlockCache(tmp_path / "file", block_bytes=BLOCK))
    with pytest.warns(UserWarning, match=r"cannot cache a block \(Not a directory|File exists\)"):
        assert opened.read(0, 5000) == CONTENT[:5000]
    monkeypatch.setattr(block_cache.fcntl, "flock", no_space)
    cache = BlockCache(tmp_path / "cache", block_bytes=BLOCK)
    assert CachedBytes(server.url(), cache).read(0, 5000) == CONTENT[:5000]
    assert len(blocks(cache)) == 5


def test_the_environment_names_the_cache(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWURST_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("REWURST_CACHE_BYTES", "1000000")
    before = storage.process_stats()["bytes_fetched"]
    assert open_bytes(server.url()).read(0, 5) == CONTENT[:5]
    cache = BlockCache.from_environment()
    assert (cache.capacity, len(blocks(cache))) == (1_000_000, 1)
    assert storage.process_stats()["bytes_fetched"] == before + len(CONTENT)
    monkeypatch.setenv("REWURST_CACHE_BYTES", "1 GB")
    with pytest.raises(UsageError, match="REWURST_CACHE_BYTES is '1 GB', expected a number of bytes such as"):
        BlockCache.from_environment()


def test_few_blocks_stay_mapped(server: Any, cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "MAPPED_BLOCKS", 3)
    CachedBytes(server.url(), cache).read(0, 10_000)
    assert len(cache._mapped) == 3


# S3


def test_objects_in_s3(bucket: Any, cache: BlockCache) -> None:
    bucket.put_object(Bucket="corpora", Key="a/x.tar", Body=CONTENT)
    bucket.put_object(Bucket="corpora", Key="b/x.tar", Body=CONTENT[::-1])
    bucket.put_object(Bucket="corpora", Key="empty", Body=b"")
    opened = open_bytes("s3://corpora/a/x.tar", size=len(CONTENT), cache=cache)
    other = open_bytes("s3://corpora/b/x.tar", cache=cache)
    for begin, end in [(0, 10), (1000, 5000), (9999, 10_000), (0, 10_000)]:
        assert opened.read(begin, end) == CONTENT[begin:end]
        assert other.read(begin, end) == CONTENT[::-1][begin:end]
    assert isinstance(opened, CachedBytes)
    assert opened.stats.bytes_fetched == len(CONTENT)
    assert opened.identity
    assert read_whole("s3://corpora/a/x.tar") == CONTENT
    assert read_whole("s3://corpora/empty") == b""
    bucket.put_object(Bucket="corpora", Key="a/x.tar", Body=CONTENT[1:] + b"!")
    assert open_bytes("s3://corpora/a/x.tar", cache=cache).read(0, 9) == CONTENT[1:10]
    assert pickle.loads(pickle.dumps(other)).read(5, 9) == CONTENT[::-1][5:9]


def test_objects_that_s3_does_not_have(bucket: Any, cache: BlockCache) -> None:
    with pytest.raises(UsageError, match=r"^s3://corpora/none: no such object$"):
        open_bytes("s3://corpora/none", cache=cache)
    with pytest.raises(FileNotFoundError, match=r"^s3://other/none: no such object$"):
        read_whole("s3://other/none")


def test_forked_workers_read_from_s3(bucket: Any, cache: BlockCache) -> None:
    bucket.put_object(Bucket="corpora", Key="x.tar", Body=CONTENT)
    opened = open_bytes("s3://corpora/x.tar", cache=cache)
    opened.read(0, 1)  # the parent's event loop runs
    loader = DataLoader(ranges.Ranges(opened), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert b"".join(loader) == CONTENT


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    monkeypatch.setattr(remote, "_file_systems", {})
    with pytest.raises(UsageError, match=r"^s3://b/k: s3:// needs a package: pip install 'rewurst\[remote\]'$"):
        read_whole("s3://b/k")
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"^nonsense://b/k: Protocol not known"):
        read_whole("nonsense://b/k")
