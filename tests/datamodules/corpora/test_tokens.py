"""Token shards are read back by us and by webdataset, and damage is reported in one line."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from rewurst import UsageError
from rewurst.datamodules.corpora import open_shards as shard_reading
from rewurst.datamodules.corpora.tokens import TokenIndex, TokenShards
from rewurst.preparation.verify import verify
from rewurst.preparation.writing.token_writer import TokenWriter

LENGTH = 7
STREAM = np.random.default_rng(0).integers(0, 2048, 1000)
ROWS = (len(STREAM) - 1) // LENGTH


webdataset_leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def write(folder: Path, pieces: list[Any], **changes: Any) -> TokenIndex:
    arguments: dict[str, Any] = {
        "name": "code", "sequence_length": LENGTH, "vocab_size": 2048, "rows_per_sample": 8, "rows_per_shard": 32,
        **changes,
    }  # fmt: skip
    with TokenWriter(folder, **arguments) as writer:
        for piece in pieces:
            writer.append(np.asarray(piece, dtype=np.int64), documents=1)
        return writer.close()


def oracle(stream: np.ndarray, length: int) -> np.ndarray:
    """Cut rows from the whole stream one by one."""
    starts = range(0, len(stream) - length, length)
    return np.array([stream[start : start + length + 1] for start in starts], dtype=np.int64)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "code"
    write(folder, np.array_split(STREAM, 13))
    return folder


@pytest.fixture
def corpus(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy of the corpus that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "code"))


def test_rows_are_read_in_the_order_given(pristine: Path) -> None:
    reader = TokenShards(pristine)
    rows = np.random.default_rng(1).integers(0, ROWS, 300)
    read = reader.read(rows)
    assert len(reader) == ROWS
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, oracle(STREAM, LENGTH)[rows])
    assert reader.read(np.array([], dtype=np.int64)).shape == (0, LENGTH + 1)


@webdataset_leaves_files_open
def test_webdataset_reads_the_same_rows(pristine: Path) -> None:
    urls = [str(pristine / shard.name) for shard in TokenIndex.load(pristine).shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    np.testing.assert_array_equal(np.concatenate([sample["npy"] for sample in samples]), oracle(STREAM, LENGTH))
    assert len({sample["__key__"] for sample in samples}) == len(samples) == -(-ROWS // 8)


@webdataset_leaves_files_open
def test_tars_are_byte_for_byte_those_of_webdatasets_writer(pristine: Path, tmp_path: Path) -> None:
    shard = pristine / "code-000001.tar"
    with wds.TarWriter(str(tmp_path / "theirs.tar"), user="", group="", mode=0o644, mtime=0) as writer:
        for sample in wds.WebDataset(str(shard), shardshuffle=False).decode():
            writer.write({"__key__": sample["__key__"], "npy": sample["npy"]})
    assert (tmp_path / "theirs.tar").read_bytes() == shard.read_bytes()


def test_sidecar_holds_the_offsets_of_the_headers_and_of_the_end(pristine: Path) -> None:
    for shard in TokenIndex.load(pristine).shards:
        with tarfile.open(pristine / shard.name) as tar:
            expected = [member.offset for member in tar.getmembers()] + [tar.offset]
        offsets = np.fromfile(pristine / shard.idx_name, dtype="<u8")
        assert offsets.tolist() == expected
        assert len(offsets) == shard.samples + 1


def test_index_describes_the_corpus(pristine: Path) -> None:
    index = TokenIndex.load(pristine)
    assert (index.rows, index.tokens, index.documents) == (ROWS, ROWS * LENGTH, 13)
    assert index.tokens + index.dropped_tokens + 1 == len(STREAM)
    assert [shard.rows for shard in index.shards] == [32, 32, 32, 32, ROWS - 128]
    for shard in index.shards:
        content = (pristine / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    raw = json.loads((pristine / "index.json").read_text())
    assert (raw["version"], raw["kind"], raw["dtype"]) == (1, "text", "uint16")


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.lists(st.integers(0, 299), max_size=60), max_size=12),
    length=st.integers(1, 9),
    samples_per_shard=st.integers(1, 3),
)
def test_any_pieces_give_the_rows_of_their_stream(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]], length: int, samples_per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    stream = np.array([token for piece in pieces for token in piece], dtype=np.int64)
    shape = {"sequence_length": length, "rows_per_sample": 4, "rows_per_shard": 4 * samples_per_shard}
    if len(stream) < length + 1:
        with pytest.raises(UsageError, match=f"{len(stream)} tokens fill no row of {length + 1}"):
            write(folder, pieces, **shape)
        assert list(folder.iterdir()) == []
        return
    index = write(folder, pieces, **shape)
    reader = TokenShards(folder)
    np.testing.assert_array_equal(reader.read(np.arange(len(reader))), oracle(stream, length))
    assert index.tokens + index.dropped_tokens + 1 == len(stream)
    assert all(shard.samples == samples_per_shard for shard in index.shards[:-1])
    assert verify(folder) == []


def test_pieces_do_not_change_a_byte(pristine: Path, tmp_path: Path) -> None:
    write(tmp_path, [*STREAM[:700].reshape(-1, 1), STREAM[700:]])
    for path in pristine.glob("*.[ti]*"):
        if path.name != "index.json":  # which counts documents
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_dtype_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    stream = np.arange(vocab_size - 20, vocab_size)
    assert write(tmp_path, [stream], vocab_size=vocab_size).dtype == dtype
    np.testing.assert_array_equal(TokenShards(tmp_path).read(np.array([1, 0])), oracle(stream, LENGTH)[[1, 0]])


def test_a_reader_opens_nothing_before_the_first_row(corpus: Path) -> None:
    for tar in corpus.glob("*.tar"):
        tar.unlink()
    assert len(TokenShards(corpus)) == ROWS


def test_a_reader_survives_pickling_and_keeps_few_shards_open(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reading, "MAX_OPEN", 2)
    reader = TokenShards(pristine)
    expected = reader.read(np.arange(ROWS))
    assert len(reader._shards._open) == 2
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._shards._open
    np.testing.assert_array_equal(copy.read(np.arange(ROWS)[::-1]), expected[::-1])
    assert copy.fingerprint() == reader.fingerprint()


def test_locate_names_shard_member_and_row(pristine: Path) -> None:
    reader = TokenShards(pristine)
    assert reader.locate(0) == "code-000000.tar, member 000000.npy, row 0"
    assert reader.locate(32 + 8 + 5) == "code-000001.tar, member 000005.npy, row 5"


def test_fingerprint_follows_the_tokens_and_not_the_names(pristine: Path, tmp_path: Path) -> None:
    first = TokenShards(pristine).fingerprint()
    write(tmp_path / "same", [STREAM], name="other", sources=("elsewhere",))
    write(tmp_path / "different", [STREAM[::-1]])
    assert TokenShards(tmp_path / "same").fingerprint() == first
    assert TokenShards(tmp_path / "different").fingerprint() != first


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, ROWS], f"row {ROWS} is out of range, the corpus has rows 0 to {ROWS - 1}"),
        ([-1], "row -1 is out of range"),
        ([[1]], r"rows have shape \(1, 1\)"),
        ([0.5], "type float64"),
    ],
)
def test_missing_rows(pristine: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(IndexError, match=message):
        TokenShards(pristine).read(np.array(rows))


@pytest.mark.parametrize(
    ("changes", "piece", "message"),
    [
        ({"rows_per_shard": 20}, [], "rows_per_shard is 20, expected a multiple of 8 such as 16"),
        ({"sequence_length": 0}, [], "sequence_length is 0, expected 1 or more"),
        ({}, [1, 2048], "token 2048 is outside the vocabulary of 2048"),
        ({}, [-3, 0], "token -3 is outside the vocabulary of 2048"),
        ({}, [[1], [2]], r"tokens have shape \(2, 1\)"),
    ],
)
def test_tokens_that_cannot_be_written(tmp_path: Path, changes: dict[str, Any], piece: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write(tmp_path, [piece], **changes)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> None:
        with TokenWriter(tmp_path, name="x", sequence_length=3, vocab_size=9, rows_per_sample=2) as writer:
            writer.append(np.ones(100, dtype=np.int64))
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_killed_leaves_no_index(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, name="x", sequence_length=3, vocab_size=9, rows_per_sample=2, rows_per_shard=2)
    writer.append(np.ones(100, dtype=np.int64))
    with pytest.raises(UsageError, match=r"has no index.json: its preparation did not finish"):
        TokenShards(tmp_path)
    writer.abort()


def test_a_full_disk_is_one_line_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"code-000000.tar: cannot be written \(No space left on device\)"):
        write(tmp_path, [STREAM])
    assert list(tmp_path.iterdir()) == []


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(corpus: Path) -> None:
        index = json.loads((corpus / "index.json").read_text())
        (corpus / "index.json").write_text(json.dumps({**index, **changes}))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda corpus: (corpus / "index.json").write_text("{"), r"index.json: not valid JSON \(.*\); prepare"),
        (lambda corpus: (corpus / "index.json").write_text("[]"), "index.json: contains a list, expected an object"),
        (edit(kind="images"), "index.json: kind is 'images', expected 'text'"),
        (edit(version=2), "index.json: version is 2, this rewurst reads versions up to 1"),
        (edit(dtype="object"), "index.json: dtype is 'object', expected one of uint16, uint32"),
        (edit(rows=True), "index.json: rows is True, expected a whole number from 0"),
        (edit(rows=5), f"index.json: rows is 5, expected {ROWS}"),
        (edit(tokens=5), f"index.json: tokens is 5, expected {ROWS * LENGTH}"),
        (edit(sequence_length=0), "index.json: sequence_length is 0, expected 1"),
        (edit(sources="x"), "index.json: sources is 'x', expected a list"),
        (edit(shards=[{"name": "a.tar"}]), r"index.json, shards\[0\]: bytes is None, expected a whole number"),
        (
            edit(rows=8, tokens=56, shards=[{"name": "../a.tar", "bytes": 1, "samples": 1, "rows": 8, "sha256": ""}]),
            "index.json: shard name is '../a.tar', expected a plain file name",
        ),
    ],
)
def test_an_index_that_is_wrong(corpus: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(corpus)
    with pytest.raises(UsageError, match=message) as error:
        TokenShards(corpus)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_a_corpus(corpus: Path) -> None:
    outside = corpus.parent
    for path, message in [
        (
            outside / "cod",
            rf"no corpus at {outside}/cod; did you mean {corpus}\? make one with `rewurst prepare text.images",
        ),
        (
            outside / "zzzz",
            f"no corpus at {outside}/zzzz: make one with `rewurst prepare text.images SOURCE... --out DIR`",
        ),
        (outside, rf"has no index.json; did you mean {corpus}\?"),
        (corpus / "code-000000.tar", "is a file, expected the folder of a prepared corpus"),
    ]:
        with pytest.raises(UsageError, match=message):
            TokenShards(path)


def replace_member(corpus: Path, array: np.ndarray) -> None:
    """Put another array, padded to the same size, in place of the shard's second member."""
    offsets = np.fromfile(corpus / "code-000001.idx", dtype="<u8").astype(int)
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=True)
    with (corpus / "code-000001.tar").open("r+b") as file:
        file.seek(offsets[1] + 512)
        file.write(content.getvalue()[: offsets[2] - offsets[1] - 512])


class Bomb:
    """Object that fails the test when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("a pickle has been loaded",)


def resize(name: str, size: int) -> Callable[[Path], None]:
    return lambda corpus: os.truncate(corpus / name, size)


def shift_offsets(corpus: Path) -> None:
    offsets = np.fromfile(corpus / "code-000001.idx", dtype="<u8")
    offsets[1] += 512
    offsets.tofile(corpus / "code-000001.idx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda corpus: (corpus / "code-000001.tar").unlink(),
            r"code-000001.tar: cannot be read .*index.json lists it",
        ),
        (resize("code-000001.tar", 900), "code-000001.tar: 900 bytes found, 10240 expected"),
        (resize("code-000001.tar", 0), "code-000001.tar: 0 bytes found, 10240 expected"),
        (
            lambda corpus: (corpus / "code-000001.idx").unlink(),
            r"code-000001.idx: missing; copy it next to code-000001.tar or index again",
        ),
        (resize("code-000001.idx", 32), "code-000001.idx: 32 bytes found, 40 expected for 4 members"),
        (shift_offsets, "code-000001.tar: no npy header at byte 2048 "),
        (
            lambda corpus: replace_member(corpus, np.zeros((8, 8), dtype=np.uint32)),
            r"code-000001.tar: member at byte 1024 contains uint32 of shape \(8, 8\) in C order, expected uint16 rows",
        ),
        (
            lambda corpus: replace_member(corpus, np.zeros((8, 7), dtype=np.uint16)),
            r"contains uint16 of shape \(8, 7\) in C order, expected uint16 rows of shape \(8, 8\)",
        ),
        (lambda corpus: replace_member(corpus, np.zeros((8, 8), dtype=np.uint16, order="F")), "in Fortran order"),
        (lambda corpus: replace_member(corpus, np.full((8, 8), Bomb())), r"contains object of shape \(8, 8\)"),
    ],
)
def test_a_shard_that_is_damaged(corpus: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(corpus)
    reader = TokenShards(corpus)
    reader.read(np.arange(32))  # other shards are still read
    with pytest.raises(UsageError, match=message) as error:
        reader.read(np.arange(ROWS))
    assert "\n" not in str(error.value)
    assert any(str(error.value) == problem for problem in verify(corpus))


def flip(name: str, position: int) -> Callable[[Path], None]:
    def apply(corpus: Path) -> None:
        content = bytearray((corpus / name).read_bytes())
        content[position] ^= 1
        (corpus / name).write_bytes(content)

    return apply


def older_sidecar(corpus: Path) -> None:
    """Write the sidecar of another preparation: the last offset differs, which reading would never notice."""
    offsets = np.fromfile(corpus / "code-000002.idx", dtype="<u8")
    offsets[-1] += 512
    offsets.tofile(corpus / "code-000002.idx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip("code-000000.tar", 700), "code-000000.tar: SHA-256 is "),
        (older_sidecar, "code-000002.idx: says samples end at "),
        (lambda corpus: (corpus / "code-000009.tar").write_bytes(b""), "code-000009.tar: not listed in index.json"),
        (edit(tokenizer_sha256="abc"), "tokenizer.json: missing"),
    ],
)
def test_verify_finds_what_reading_does_not(corpus: Path, damage: Callable[[Path], None], message: str) -> None:
    assert verify(corpus) == []
    damage(corpus)
    TokenShards(corpus).read(np.arange(ROWS))
    problems = verify(corpus)
    assert len(problems) == 1
    assert message in problems[0]
