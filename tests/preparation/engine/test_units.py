"""Preparation in units without a cluster: boundaries of shards, targets, sources on a server, refusals."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rewurst import UsageError
from rewurst.datamodules.storage import remote
from rewurst.datamodules.storage.url import Url
from rewurst.preparation.engine.image_units import _cut, _text
from rewurst.preparation.engine.text_units import spans
from rewurst.preparation.images import prepare_images
from rewurst.preparation.sources.documents import Skipped, expand, identity, read
from rewurst.preparation.text import prepare_text, train_tokenizer
from rewurst.preparation.writing import image_writer
from rewurst.preparation.writing.destination import Target
from rewurst.preparation.writing.row_layout import MemberBuffer, RowLayout
from rewurst.preparation.writing.shard_file import ShardFile
from rewurst.train import main


@pytest.fixture(params=["disk", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    monkeypatch.setattr(remote, "_file_systems", {})
    yield Target(str(tmp_path / "out")) if request.param == "disk" else Target("memory://units/out")
    if fsspec.filesystem("memory").exists("/units"):
        fsspec.filesystem("memory").rm("/units", recursive=True)


def test_a_target_contains_the_written_files(target: Target) -> None:
    assert target.names() == []
    assert target.read("a/b.txt") is None
    target.write("a/b.txt", "one")
    target.write("a/b.txt", "zwölf")
    with target.scratch() as scratch:
        (scratch / "c.tar").write_bytes(b"two")
        target.publish(scratch / "c.tar", "c.tar")
        assert not any(name.endswith("c.tar") and name != "c.tar" for name in target.names())
    assert not scratch.exists()
    assert target.names() == ["a/b.txt", "c.tar"]
    assert target.names("a") == ["a/b.txt"]
    assert target.read("a/b.txt") == "zwölf".encode()
    target.remove("a")
    target.remove("a")
    assert target.names() == ["c.tar"]


def test_unwritable_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"https://x/out: cannot write over http; give a folder, or s3://"):
        Target("https://x/out")
    with pytest.raises(UsageError, match="Protocol not known: nothere"):
        Target("nothere://x/out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file, expected a folder"):
        Target(str(tmp_path / "file")).refuse_file()
    with pytest.raises(UsageError, match="cannot be written"):
        Target(str(tmp_path / "file")).write("a", "b")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_spans_are_what_a_slice_of_the_whole_stream_holds(counts: list[int], data: Any) -> None:
    stream = [(f"run {run}", i) for run, count in enumerate(counts) for i in range(count)]
    begin = data.draw(st.integers(0, max(len(stream) - 1, 0)))
    end = data.draw(st.integers(min(begin + 1, len(stream)), len(stream)))
    if begin == end:
        return
    found = spans([f"run {run}" for run in range(len(counts))], np.array(counts), begin, end)
    assert [(span.part, i) for span in found for i in range(span.begin, span.end)] == stream[begin:end]
    assert all(span.begin < span.end for span in found)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(5, 60), st.data())
def test_each_shard_by_itself_has_the_rows_of_one_pass(
    length: int, rows_per_sample: int, samples_per_shard: int, tokens: int, data: Any
) -> None:
    layout = RowLayout(
        name="a", sequence_length=length, vocab_size=99, rows_per_sample=rows_per_sample,
        rows_per_shard=rows_per_sample * samples_per_shard,
    )  # fmt: skip
    stream = np.arange(tokens)
    rows = [stream[i * length : (i + 1) * length + 1].tolist() for i in range(layout.rows(tokens, "x"))]
    found = []
    for begin in range(0, len(rows) * length, layout.tokens_per_shard):
        part = stream[begin : min(begin + layout.tokens_per_shard, len(rows) * length) + 1]
        buffer, members = MemberBuffer(layout), []
        cut = data.draw(st.integers(0, len(part)))
        for piece in (part[:cut], part[cut:]):
            members += [member.tolist() for member in buffer.add(piece)]
        if (rest := buffer.rest()) is not None:
            members.append(rest.tolist())
        assert len(members) <= samples_per_shard
        found += [row for member in members for row in member]
    assert found == rows


@pytest.mark.parametrize("limit", [None, 1, 3])
def test_shards_of_pictures_are_cut_by_the_bytes_that_a_tar_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr(image_writer, "SHARD_BYTES", 9000)
    sizes = np.random.default_rng(0).integers(1, 5000, 40)
    expected, file = list[int](), ShardFile(tmp_path / "0.tar")
    for number, size in enumerate(sizes):
        file.add_members(str(number), {"png": bytes(size)})
        if file.samples == limit or (limit is None and file.bytes >= 9000):
            expected.append(file.close().samples)
            file = ShardFile(tmp_path / f"{len(expected)}.tar")
    if file.samples:
        expected.append(file.samples)
    file.discard()
    stored = 512 + -(-sizes // 512) * 512  # header and padded content
    parts = [({"name": str(i)}, _text(np.cumsum(stored[i : i + 7]).astype("<u8"))) for i in range(0, 40, 7)]
    found = [sum(span.end - span.begin for span in shard) for shard in _cut(parts, limit)]
    assert found == expected


def test_text_on_a_server_reads_as_on_the_disk(loopback: Any, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {i} ü"}) + "\n" for i in range(500)).encode()
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(300)]}), tmp_path / "c.parquet", row_group_size=50)
    files = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstd.compress(lines),
        "b.txt": b"one document\n" * 20_000,
        "c.parquet": (tmp_path / "c.parquet").read_bytes(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        loopback.behaviour.objects[f"/d/{name}"] = content
    for name in files:
        [here] = expand([str(tmp_path / name)], Skipped())
        [there] = expand([loopback.url(f"/d/{name}") + "?signature=secret"], Skipped())
        assert list(read(there, "text", Skipped())) == list(read(here, "text", Skipped()))
        assert identity(there)[1:] == (len(files[name]), '"one"')
    with pytest.raises(UsageError, match=r"/d/none.txt: status 404") as error:
        expand([loopback.url("/d/none.txt") + "?signature=secret"], Skipped())
    assert "secret" not in str(error.value)
    with pytest.raises(UsageError, match="/d: a folder cannot be listed over http; name its files"):
        expand([loopback.url("/d")], Skipped())


def test_errors_in_sources_on_a_server_say_where(loopback: Any) -> None:
    loopback.behaviour.objects |= {"/a.jsonl": b'{"text": "a"}\n{', "/b.txt": b"abc\xff", "/c.jsonl.gz": b"x"}
    for name, message in {
        "a.jsonl": r"/a\.jsonl:2: not valid JSON",
        "b.txt": r"/b\.txt: byte 3 \(0xff\) is not valid UTF-8",
        "c.jsonl.gz": r"/c\.jsonl\.gz: truncated or damaged \.gz file",
    }.items():
        [file] = expand([loopback.url(f"/{name}")], Skipped())
        with pytest.raises(UsageError, match=message):
            list(read(file, "text", Skipped()))


def test_a_folder_on_object_storage_is_listed_as_one_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "_file_systems", {})
    system = fsspec.filesystem("memory")
    names = ["b.txt", "a/z.txt", "a.b/y.jsonl", "a/x.md", "a/skip.bin"]
    for name in names:
        system.pipe_file(f"/listed/{name}", b"{}")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    there, here = Skipped(), Skipped()
    found = [file.name.removeprefix("memory://listed/") for file in expand(["memory://listed"], there)]
    assert found == [str(Path(file.name).relative_to(tmp_path)) for file in expand([str(tmp_path)], here)]
    assert len(there.unknown_files) == len(here.unknown_files) == 1
    with pytest.raises(UsageError, match="no such folder, or none with a file of a known kind"):
        expand(["memory://listed/none"], Skipped())
    system.rm("/listed", recursive=True)


def test_a_table_on_a_server_names_pictures_next_to_it(loopback: Any, tmp_path: Path) -> None:
    rows = []
    (tmp_path / "t" / "sub").mkdir(parents=True)
    for number in range(5):
        content, name = io.BytesIO(), f"sub/{number}.png"
        Image.new("RGB", (20, 20), (number, 0, 0)).save(content, "png")
        loopback.behaviour.objects[f"/t/{name}"] = content.getvalue()
        (tmp_path / "t" / name).write_bytes(content.getvalue())
        rows.append(json.dumps({"file_name": name, "text": f"number {number}"}) + "\n")
    loopback.behaviour.objects["/t/metadata.jsonl"] = "".join(rows).encode()
    (tmp_path / "t" / "metadata.jsonl").write_text("".join(rows))
    for number, source in enumerate([str(tmp_path / "t"), loopback.url("/t"), loopback.url("/t/metadata.jsonl")]):
        prepare_images(source, tmp_path / str(number), progress=False)
    one, *others = [next((tmp_path / str(i) / "train").glob("*.tar")).read_bytes() for i in range(3)]
    assert all(other == one for other in others)


def test_a_url_keeps_its_query_where_it_has_one() -> None:
    signed = Url("https://user:pw@x/a/b.tar.gz?s=1")
    assert (signed.name, signed.suffix, signed.suffixes) == ("b.tar.gz", ".gz", [".tar", ".gz"])
    assert signed.with_suffix(".txt").url == "https://user:pw@x/a/b.tar.txt?s=1"
    assert (signed.parent / "c").url == "https://user:pw@x/a/c?s=1"
    assert str(signed) == "https://x/a/b.tar.gz"
    key = Url("s3://bucket/a?b/c#d.png", ("a?b", "c#d.png"))
    assert key.with_suffix(".txt") == Url("s3://bucket/a?b/c#d.txt", ("a?b", "c#d.txt"))
    assert key.parent.url == "s3://bucket/a?b"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text("some text " * 100)
    train_tokenizer([str(tmp_path / "a.txt")], 260, tmp_path / "tokenizer", progress=False)
    return ["prepare", "text", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tokenizer")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--engine", "rai"], "invalid choice: 'rai' (choose from 'local', 'ray'); did you mean 'ray'?"),
        (["--ray_address", "auto"], "ray_address is 'auto', which --engine ray is for; engine is 'local'"),
        (["--engine", "ray"], "engine ray needs a package: pip install 'rewurst[ray]'"),
    ],
)
def test_refusals(
    arguments: list[str],
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*arguments, "--out", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*sends neither ETag nor Last-Modified")
def test_the_local_engine_writes_to_a_url_too(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_file_systems", {})
    options = ["--sequence_length", "8"]
    assert main([*arguments, "--out", "memory://local/out", *options]) == 0
    assert main([*arguments, "--out", str(tmp_path / "out"), *options]) == 0
    there, here = Target("memory://local/out"), Target(str(tmp_path / "out"))
    assert {name: there.read(name) for name in there.names()} == {name: here.read(name) for name in here.names()}
    assert "train/index.json" in here.names()
    fsspec.filesystem("memory").rm("/local", recursive=True)


def test_the_folder_of_an_unfinished_preparation_may_be_overwritten(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "out" / ".preparing" / "tokens").mkdir(parents=True)
    (tmp_path / "out" / ".preparing" / "tokens" / "000000-train.tokens").write_text("")
    with pytest.raises(UsageError, match="is not empty"):
        prepare_text([arguments[2]], arguments[4], tmp_path / "out", sequence_length=8, progress=False)
    prepare_text([arguments[2]], arguments[4], tmp_path / "out", sequence_length=8, overwrite=True, progress=False)
    assert not (tmp_path / "out" / ".preparing").exists()
