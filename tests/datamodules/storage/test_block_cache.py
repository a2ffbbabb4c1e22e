"""The node's cache: blocks are fetched once, checked, bounded in number and shared by processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranges
from remote_objects import BLOCK, CONTENT, blocks
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.datamodules.storage import block_cache
from rewurst.datamodules.storage import random_access as storage
from rewurst.datamodules.storage.block_cache import BlockCache, ReadStats
from rewurst.datamodules.storage.random_access import CachedBytes, open_bytes


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_and_download_each_block_once(server: Any, cache: BlockCache, method: str) -> None:
    opened = CachedBytes(server.url(), cache)
    opened.read(0, 1)
    loader = DataLoader(ranges.Ranges(opened), batch_size=None, num_workers=2, multiprocessing_context=method)
    assert b"".join(loader) == CONTENT
    fetched = server.behaviour.ranges
    assert len(fetched) == len(set(fetched)) == 11  # the size and ten blocks


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


def fetched(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def test_the_least_recently_used_block_is_evicted_first(tmp_path: Path) -> None:
    cache, stats = BlockCache(tmp_path, capacity=4 * (100 + 16), block_bytes=100), ReadStats()
    for number in range(4):
        cache.block("ab" * 32, number, 100, fetched(bytes([number]) * 100), stats)
        os.utime(tmp_path / "ab" / ("ab" * 32) / str(number), ns=(number, number))
    cache._mapped.clear()
    cache.block("ab" * 32, 0, 100, pytest.fail, stats)  # just used, so the youngest
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


def test_leftovers_of_a_killed_process_count_and_are_evicted(tmp_path: Path) -> None:
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


def test_a_full_disk_is_counted_and_reported_once(
    server: Any, cache: BlockCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_cache.os, "write", no_space)
    opened = CachedBytes(server.url(), cache)
    with pytest.warns(UserWarning, match=r"cannot cache a block \(No space left on device\); reading cont") as told:
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
