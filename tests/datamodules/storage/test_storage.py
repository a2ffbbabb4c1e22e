"""Reading by position from disk, and the meaning of paths."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from remote_objects import CONTENT

from rewurst import UsageError
from rewurst.datamodules.storage.block_cache import BlockCache
from rewurst.datamodules.storage.random_access import LocalBytes, is_remote, join, open_bytes, read_whole


def local(tmp_path: Path, content: bytes = CONTENT) -> Path:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    return path


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
def test_ranges_outside_of_the_file(tmp_path: Path, server: Any, cache: BlockCache, begin: int, end: int) -> None:
    for opened in (open_bytes(str(local(tmp_path))), open_bytes(server.url(), cache=cache)):
        with pytest.raises(UsageError, match=rf"x.tar, bytes {begin} to {end}: no such range, the file has 10000"):
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
