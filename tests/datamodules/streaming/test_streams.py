"""Streamed corpora: every row once per pass, an exact replay share, an exact resume, and nothing lost silently."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from save_at import SaveAt
from text_reading import Reader, fit
from tokenizers import Tokenizer

from rewurst import UsageError
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.datamodules.streaming import token_stream
from rewurst.datamodules.streaming.order import Place, ShardOrder, approximate
from rewurst.datamodules.streaming.stream import expand_tars
from rewurst.datamodules.streaming.tars import samples
from rewurst.preparation.tokenizer import train_tokenizer
from rewurst.tokenizer_files import load_tokenizer

LENGTH = 8
ROWS = 12  # of a tar
SHARDS = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("the cat sat on the mat " * 40)
    train_tokenizer([str(folder / "a.txt")], 264, folder / "bpe", progress=False)
    return str(folder / "bpe")


@pytest.fixture
def stream(tmp_path: Path) -> str:
    """Tars of three members of four rows each; the first two tokens of a row say which one it is."""
    for shard in range(SHARDS):
        with wds.TarWriter(str(tmp_path / f"s-{shard:03d}.tar")) as writer:
            for member in range(3):
                rows = np.zeros((4, LENGTH + 1), dtype=np.uint16)
                rows[:, 0], rows[:, 1] = shard, member * 4 + np.arange(4)
                content = io.BytesIO()
                np.save(content, rows)
                writer.write({"__key__": f"{shard}-{member}", "npy": content.getvalue()})
    return str(tmp_path / f"s-{{000..{SHARDS - 1:03d}}}.tar")


@pytest.fixture
def make(stream: str, tokenizer: str, tmp_path: Path) -> Callable[..., TextDataModule]:
    def build(**changes: Any) -> TextDataModule:
        arguments: dict[str, Any] = {
            "dataset": "web",
            "corpora": {"web": Corpus(stream=stream)},
            "val": {},
            "sequence_length": LENGTH,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "tokenizer": tokenizer,
            "cache_dir": str(tmp_path / "cache"),
        }
        return TextDataModule(**{**arguments, **changes})

    return build


def rows_read(module: Reader) -> list[tuple[int, int]]:
    return [(int(row[0]), int(row[1])) for row in torch.cat(module.tokens)]


ALL = {(shard, row) for shard in range(SHARDS) for row in range(ROWS)}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_row_comes_once_per_pass(make: Callable[..., TextDataModule], workers: int) -> None:
    found = rows_read(fit(make(num_workers=workers), 36))
    assert len(found) == 2 * len(ALL)
    assert set(found[:72]) == ALL
    assert set(found[72:]) == ALL
    assert found[:72] != found[72:]  # another order
    assert found[:72] != sorted(found[:72])


def test_a_second_pass_is_reported_once(make: Callable[..., TextDataModule]) -> None:
    with pytest.warns(UserWarning, match="corpus 'web' is read again: a reader has been through all of its tars"):
        fit(make(), 20)


def test_processes_share_the_tars(stream: str) -> None:
    urls = tuple(expand_tars(stream, allow_pipe=False))
    order = ShardOrder("web", urls, 0, 4)
    for epoch in range(3):
        parts = [order.own(reader, epoch) for reader in range(4)]
        assert sorted(url for part in parts for url in part) == sorted(urls)
    assert order.own(0, 0) != order.own(0, 1)
    assert ShardOrder("web", urls, 1, 4).own(0, 0) != order.own(0, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("stopped", [1, 7, 19])
def test_a_resume_reads_exactly_what_would_have_followed(
    make: Callable[..., TextDataModule],
    tmp_path: Path,
    workers: int,
    micro_batch_size: int,
    stopped: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_stream, "BUFFER_ROWS", 5)
    options = {"num_workers": workers, "micro_batch_size": micro_batch_size}
    whole = rows_read(fit(make(**options), 26))
    accumulation, path = 4 // micro_batch_size, tmp_path / "a.ckpt"
    first = rows_read(fit(make(**options), 26, SaveAt(stopped * accumulation, path)))
    assert first[: 4 * stopped] == whole[: 4 * stopped]
    assert rows_read(fit(make(**options), 26, ckpt_path=path)) == whole[4 * stopped :]
    state = torch.load(path, weights_only=True)["TextDataModule"]["streams"]
    assert len(json.dumps(state)) < 200


def test_other_workers_resume_approximately_and_say_so(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(make(num_workers=2), 26, SaveAt(18, path))
    with pytest.warns(UserWarning, match=r"1 processes of 2 workers .* it resumes approximately"):
        rest = rows_read(fit(make(num_workers=1), 18, ckpt_path=path))
    assert len(rest) == 36
    assert len(set(rest)) > 24  # it did not begin again with what was read


def test_about_as_many_tars_are_read_after_an_approximate_resume() -> None:
    order = ShardOrder("web", tuple(map(str, range(12))), 0, 2)
    assert approximate([[Place(0, 1, 5), Place(0, 2, 0), Place(0, 1, 0), Place(0, 2, 2)]], order) == Place(0, 3, 0)
    assert approximate([[Place(2, 0, 0)] * 4], order) == Place(2, 0, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streamed", ["web", "old"])
def test_the_replay_share_is_exact_in_every_batch(
    make: Callable[..., TextDataModule],
    write_corpus: Callable[..., str],
    stream: str,
    tokenizer: str,
    workers: int,
    streamed: str,
) -> None:
    folder = write_corpus("other", 40)
    content = json.loads(Path(folder, "index.json").read_text())
    content["tokenizer_sha256"] = load_tokenizer(tokenizer).sha256
    Path(folder, "index.json").write_text(json.dumps(content))
    other = Corpus(folder, replay=streamed == "web")
    corpora = {"web": Corpus(stream=stream, replay=streamed == "old"), "other": other}
    data = make(corpora=corpora, num_workers=workers, global_batch_size=20, micro_batch_size=5)
    module = fit(data, 12, share=0.05)
    for step in range(12):
        batch = module.rows[20 * step : 20 * (step + 1)]
        assert sum(corpus == 1 for corpus, _ in batch) == 1


TEXTS = [f"the cat sat on mat {i} " * (1 + i % 5) for i in range(60)]


def text_tars(folder: Path, suffix: str) -> str:
    for shard in range(4):
        with wds.TarWriter(str(folder / f"t-{shard}.tar")) as writer:
            for i in range(15):
                text = TEXTS[shard * 15 + i]
                member: dict[str, Any] = {"txt": text} if suffix == "txt" else {"json": {"body": text, "id": i}}
                writer.write({"__key__": f"{shard}-{i}", **member})
    return str(folder / "t-{0..3}.tar")


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_text_is_tokenized_and_packed_on_the_fly(
    make: Callable[..., TextDataModule], tmp_path: Path, tokenizer: str, suffix: str
) -> None:
    urls = text_tars(tmp_path, suffix)
    read = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    expected = []
    for shard in range(4):
        tokens = [t for text in TEXTS[shard * 15 : shard * 15 + 15] for t in [*read.encode(text).ids, 0]]
        expected += [tuple(tokens[i : i + LENGTH + 1]) for i in range(0, len(tokens) - LENGTH, LENGTH)]
    steps = len(expected) // 4
    found = fit(make(corpora={"web": Corpus(stream=urls)}, text_field="body", num_workers=2), steps)
    rows = [tuple(row.tolist()) for row in torch.cat(found.tokens)]
    assert len(rows) == steps * 4
    assert set(rows) <= set(expected)
    assert len(set(rows)) > 0.8 * len(set(expected))


def test_a_text_stream_resumes_exactly(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    corpora, path = {"web": Corpus(stream=text_tars(tmp_path, "txt"))}, tmp_path / "a.ckpt"
    whole = torch.cat(fit(make(corpora=corpora), 20).tokens)
    fit(make(corpora=corpora), 20, SaveAt(22, path))
    assert torch.equal(torch.cat(fit(make(corpora=corpora), 20, ckpt_path=path).tokens), whole[44:])


def compressed(path: Path) -> str:
    path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    return str(path.with_suffix(".tar.gz"))


def test_compressed_tars_and_commands(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    paths = sorted(tmp_path.glob("s-*.tar"))
    expected = rows_read(fit(make(), 18))
    urls = [compressed(path) for path in paths]
    assert set(rows_read(fit(make(corpora={"web": Corpus(stream=urls)}), 18))) == set(expected)
    pipes = [f"pipe:cat {path}" for path in paths]
    with pytest.raises(UsageError, match="runs a command; set allow_pipe: true if you trust its origin"):
        fit(make(corpora={"web": Corpus(stream=pipes)}), 18)
    assert set(rows_read(fit(make(corpora={"web": Corpus(stream=pipes, allow_pipe=True)}), 18))) == set(expected)


def put(path: Path, *members: tuple[str, bytes], link: bool = False) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo("z.txt")
            info.type, info.linkname = tarfile.SYMTYPE, "a.txt"
            tar.addfile(info)
    return str(path)


def cut(path: str, end: int) -> str:
    os.truncate(path, end)
    return path


A, B = ("a.txt", b"x" * 700), ("b.txt", b"y")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: cut(put(path, A, B), 512 + 300),
            r"cannot be read \(unexpected end of data\)|ends within 'a\.txt'",
        ),
        (lambda path: cut(put(path, A, B), 512 + 1024), "ends without the mark of a whole tar"),
        (lambda path: cut(put(path, A, B), 512 + 1024 + 100), "cannot be read|ends without the mark"),
        (lambda path: put(path, ("README", b"x")), "member 'README' has no extension; webdataset would skip it"),
        (lambda path: put(path, A, link=True), r"member 'z\.txt' is a link or a device; webdataset would skip it"),
        (
            lambda path: put(path, A, B, ("a.json", b"1")),
            "key 'a' comes again; the files of a sample",
        ),
        (lambda path: put(path, A, A), "cannot be read"),
        (lambda path: cut(compressed(Path(put(path, A, B))), 60), "cannot be read"),
        (lambda path: str(path), "cannot be read|no such file"),
    ],
)
def test_what_webdataset_loses_is_refused(tmp_path: Path, damage: Callable[[Path], str], message: str) -> None:
    url = damage(tmp_path / "x.tar")
    with pytest.raises(UsageError, match=message) as error:
        list(samples(url))
    assert url in str(error.value)
    assert "\n" not in str(error.value)


def array(rows: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, rows)
    return content.getvalue()


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("a.npy", array(np.zeros((2, 5), np.uint16))), r"holds uint16 of shape \(2, 5\), expected token rows of 9"),
        (("a.npy", array(np.full((2, 9), 999, np.uint16))), "token 999 is outside the vocabulary of 264"),
        (("a.npy", b"no array"), "no readable npy header"),
        (("a.txt", b"caf\xe9"), "not valid text"),
        (("a.json", b'{"id": 1}'), "no text in field 'text'; text_field can be one of: id"),
        (("a.png", b"x"), r"has png, expected \.npy of token rows, \.txt or \.json"),
    ],
)
def test_samples_that_are_no_text(
    make: Callable[..., TextDataModule], tmp_path: Path, member: tuple[str, bytes], message: str
) -> None:
    url = put(tmp_path / "x.tar", member)
    with pytest.raises(UsageError, match=message) as error:
        fit(make(corpora={"web": Corpus(stream=url)}), 2)
    assert "x.tar, sample 'a'" in str(error.value)


def test_what_a_stream_needs(make: Callable[..., TextDataModule], stream: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"6 tars for 7 readers \(processes times workers\); each"):
        fit(make(num_workers=7), 2)
    with pytest.raises(UsageError, match=r"is a stream, which has no epochs: set trainer\.max_steps"):
        fit(make(), -1, max_epochs=1)
    with pytest.raises(UsageError, match="the model comes without a tokenizer"):
        fit(make(tokenizer=None), 2)
    empty = put(tmp_path / "empty.tar", ("a.txt", b" "))
    with pytest.raises(UsageError, match="corpus 'web': no row in"):
        fit(make(corpora={"web": Corpus(stream=empty)}), 2)


def test_a_changed_list_of_tars_is_noticed(make: Callable[..., TextDataModule], stream: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(make(), 4, SaveAt(4, path))
    with warnings.catch_warnings(), pytest.raises(UsageError, match="differ from those of the checkpoint"):
        fit(make(corpora={"web": Corpus(stream=stream.replace("005", "004"))}), 4, ckpt_path=path)


def test_tars_on_a_server(make: Callable[..., TextDataModule], tmp_path: Path, loopback: Any) -> None:
    for path in tmp_path.glob("s-*.tar"):
        loopback.behaviour.objects[f"/d/{path.name}"] = path.read_bytes()
    url = loopback.url("/d/s-{000..005}.tar")
    assert rows_read(fit(make(corpora={"web": Corpus(stream=url)}), 18))[:1]
    assert set(rows_read(fit(make(corpora={"web": Corpus(stream=url)}), 18))) == ALL
