"""Shards without an index: webdataset's samples, distributed over ranks and workers, not decoded."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds
from backports import zstd
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.datamodules.sequential import SequentialShards

pytestmark = pytest.mark.filterwarnings("ignore:.*are read in sequence.*")


def write(folder: Path, shards: int = 4) -> list[str]:
    paths = []
    for shard in range(shards):
        paths.append(str(folder / f"x-{shard:06d}.tar"))
        with wds.TarWriter(paths[-1]) as writer:
            for number in range(3):
                writer.write({"__key__": f"{shard}-{number}", "txt": f"text {number}", "bin": bytes([number])})
    return paths


def keys(urls: list[str] | str) -> list[str]:
    return [sample["key"] for sample in SequentialShards(urls)]


EXPECTED = [f"{shard}-{number}" for shard in range(4) for number in range(3)]


def test_samples_are_bytes_by_key(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="4 shards are read in sequence: a run that resumes begins again"):
        shards = SequentialShards(write(tmp_path))
    samples = list(shards)
    assert [sample["key"] for sample in samples] == EXPECTED
    assert samples[1]["members"] == {"txt": b"text 1", "bin": b"\x01"}
    assert keys(f"{tmp_path}/x-{{000000..000003}}.tar") == EXPECTED


def gzipped(path: str) -> str:
    Path(path + ".gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    return path + ".gz"


def zstandard(path: str) -> str:
    content = Path(path).read_bytes()
    frames = [zstd.compress(part) for part in (content[:700], content[700:])]
    Path(path + ".zst").write_bytes(b"".join(frames))
    return path + ".zst"


@pytest.mark.parametrize("compress", [gzipped, zstandard, lambda path: f"file://{path}"])
def test_compressed_shards(tmp_path: Path, compress: Callable[[str], str]) -> None:
    assert keys([compress(path) for path in write(tmp_path)]) == EXPECTED


def test_ranks_and_workers_share_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls, seen = write(tmp_path), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        loader = DataLoader(SequentialShards(urls), batch_size=None, num_workers=2)
        part = [sample["key"] for sample in loader]
        assert len(part) == 6
        seen += part
    assert sorted(seen) == EXPECTED
    with pytest.raises(UsageError, match="1 shards for 2 ranks: each needs one of its own"):
        next(iter(SequentialShards(urls[:1])))


def test_pipes_only_where_they_are_allowed(tmp_path: Path) -> None:
    [path] = write(tmp_path, shards=1)
    marker = tmp_path / "ran"
    pipe = f"pipe:touch {marker}; cat {path}"
    for urls in ([pipe], f"{path}::{pipe}", f"{{{path},PIPE:cat x}}"):
        with pytest.raises(UsageError, match=r"(?i)pipe:.*: runs a command; allow_pipe=True lets it"):
            SequentialShards(urls)
    assert not marker.exists()
    samples = list(SequentialShards([pipe], allow_pipe=True))
    assert [sample["key"] for sample in samples] == EXPECTED[:3]
    assert marker.exists()
    with pytest.raises(UsageError, match=r"pipe:false: cannot be read"):
        list(SequentialShards(["pipe:false"], allow_pipe=True))


def test_a_server_is_refused() -> None:
    with pytest.raises(UsageError, match=r"http://h/x.tar: index it to read it from a server"):
        SequentialShards(["http://h/x.tar"])


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return pytest.fail, ("a pickle has been loaded",)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    content = pickle.dumps(Bomb())
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.pyd", "a.pickle", "a.pkl", "a.pth", "a.npy"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    [sample] = SequentialShards([str(tmp_path / "x.tar")])
    assert set(sample["members"].values()) == {content}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: os.truncate(path, 700), "(empty header|unexpected end of data)"),
        (lambda path: path.write_bytes(b"x" * 2000), ""),
        (lambda path: path.unlink(), "No such file or directory"),
    ],
)
def test_shards_that_cannot_be_read(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    [path] = write(tmp_path, shards=1)
    damage(Path(path))
    with pytest.raises(UsageError, match=rf"x-000000.tar: cannot be read \(.*{reason}") as error:
        keys([path])
    assert "\n" not in str(error.value)
