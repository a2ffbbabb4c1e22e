"""Ranges over http, S3 and any file system of fsspec are the file's bytes, whatever the server does."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranges
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from remote_objects import BLOCK, CONTENT, blocks
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.datamodules.storage import remote
from rewurst.datamodules.storage.block_cache import BlockCache
from rewurst.datamodules.storage.random_access import CachedBytes, open_bytes, read_whole


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


def test_only_requested_blocks_are_fetched_and_only_once(server: Any, cache: BlockCache) -> None:
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
    with pytest.raises(UsageError, match=r"/a/x.tar, bytes 0 to 1024: the object changed while it was read"):
        opened.read(0, 9)
    del server.behaviour.objects["/a/x.tar"]
    with pytest.raises(UsageError, match=r"/a/x.tar, bytes 0 to 1024: the object was removed .*status 404"):
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
    with pytest.raises(UsageError, match=r"bytes 0 to 1024: (1019 bytes received, 1024 expected|.*), 6 times"):
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


def test_credentials_are_sent_only_to_their_host(server: Any, cache: BlockCache) -> None:
    server.behaviour.redirect = server.url("/a/x.tar")
    opened = CachedBytes(server.url("/moved").replace("//", "//me:p%40ss@"), cache)
    assert opened.read(0, 9) == CONTENT[:9]
    assert server.behaviour.credentials == ["Basic bWU6cEBzcw==", ""] * 2
    assert server.behaviour.ranges == ["bytes=0-0"] * 2 + ["bytes=0-1023"] * 2  # kept by a redirect
    with pytest.raises(UsageError, match=r"^http://127.0.0.1:\d+/none: status 404") as error:
        CachedBytes(server.url("/none").replace("//", "//me:secret@"), cache)
    assert "secret" not in str(error.value)
    with pytest.raises(UsageError, match=r"^http://h:port/x: not a valid address$"):
        read_whole("http://h:port/x")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Add an ETag to fsspec's file system in memory."""
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
    """Exception like botocore's, which is not an OSError."""


@pytest.mark.parametrize(
    ("error", "message", "requests"),
    [
        (TimeoutError(), "x.tar, bytes 0 to 1024: TimeoutError, 2 times", 2),
        (OSError(5, "SlowDown"), r"x.tar, bytes 0 to 1024: \[Errno 5\] SlowDown, 2 times", 2),
        (HTTPClientError("closed"), "x.tar, bytes 0 to 1024: closed, 2 times", 2),
        (PermissionError("Access\nDenied"), "^memory://a/x.tar: Access Denied$", 1),
        (RuntimeError("Unable to locate credentials"), "^memory://a/x.tar: Unable to locate credentials$", 1),
        (FileNotFoundError(), "x.tar, bytes 0 to 1024: the object was removed", 1),
    ],
)
def test_exceptions_of_file_systems(
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


def test_a_pickled_copy_reads_without_another_request(server: Any, cache: BlockCache) -> None:
    opened = CachedBytes(server.url(), cache)
    copies = [pickle.loads(pickle.dumps(opened)) for _ in range(2)]
    assert copies[0]._cache is copies[1]._cache
    assert copies[0].read(5, 2000) == CONTENT[5:2000]
    assert server.behaviour.ranges == ["bytes=0-0", "bytes=0-1023", "bytes=1024-2047"]


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


def test_objects_missing_from_s3(bucket: Any, cache: BlockCache) -> None:
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
