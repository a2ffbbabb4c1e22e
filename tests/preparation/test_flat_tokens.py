"""Flat files of tokens of other programs: read in place, the right rows, and a line for what contradicts itself."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_reading import fit

from rewurst import UsageError
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.preparation.flat_tokens import index_flat
from rewurst.preparation.tokenizer import train_tokenizer
from rewurst.preparation.verify import verify
from rewurst.train import main

LENGTH = 8
DTYPE_CODES = {"int32": 4, "int64": 5, "uint16": 8, "float32": 7}


def documents(count: int = 12, vocab_size: int = 300) -> list[np.ndarray[Any, Any]]:
    draw = np.random.default_rng(count)
    return [draw.integers(1, vocab_size, size=int(draw.integers(1, 40))) for _ in range(count)]


def megatron(prefix: Path, parts: list[Any], dtype: str = "uint16") -> str:
    """As ``MMapIndexedDatasetBuilder`` of Megatron-LM and GPT-NeoX writes it, without reading our reader."""
    arrays = [np.asarray(part, dtype=dtype) for part in parts]
    prefix.with_suffix(".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    sizes = [array.size for array in arrays]
    pointers, address = [], 0
    for array in arrays:
        pointers.append(address)
        address += array.nbytes
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", DTYPE_CODES[dtype]))
        file.write(struct.pack("<Q", len(sizes)))
        file.write(struct.pack("<Q", len(sizes) + 1))
        file.write(np.array(sizes, dtype=np.int32).tobytes())
        file.write(np.array(pointers, dtype=np.int64).tobytes())
        file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
    return str(prefix.with_suffix(".bin"))


def nanogpt(prefix: Path, parts: list[Any], dtype: str = "uint16") -> str:
    path = prefix.with_suffix(".bin")
    np.concatenate(parts).astype(dtype).tofile(path)
    return str(path)


def llm_c(prefix: Path, parts: list[Any], dtype: str = "uint16") -> str:
    tokens = np.concatenate(parts).astype(dtype)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = {"uint16": 20240520, "uint32": 20240801}[dtype], 1, tokens.size
    prefix.with_suffix(".bin").write_bytes(header.tobytes() + tokens.tobytes())
    return str(prefix.with_suffix(".bin"))


def litdata(prefix: Path, parts: list[Any], dtype: str = "int32", chunks: int = 2) -> str:
    """As ``BinaryWriter`` writes items of one tensor each, for its ``TokensLoader``."""
    prefix.mkdir()
    code = {"uint16": 20, "int32": 16, "int64": 18}[dtype]
    listed = []
    for number in range(chunks):
        items = [np.asarray(part, dtype=dtype).tobytes() for part in parts[number::chunks]]
        begin = 4 * (len(items) + 2)
        ends = np.cumsum([begin, *map(len, items)]).astype(np.uint32)
        content = np.uint32(len(items)).tobytes() + ends.tobytes() + b"".join(items)
        (prefix / f"chunk-0-{number}.bin").write_bytes(content)
        dim = sum(map(len, items)) // np.dtype(dtype).itemsize
        listed.append(
            {"chunk_bytes": len(content), "chunk_size": len(items), "dim": dim, "filename": f"chunk-0-{number}.bin"}
        )
    config = {"compression": None, "data_format": [f"no_header_tensor:{code}"], "chunk_size": None}
    (prefix / "index.json").write_text(json.dumps({"chunks": listed, "config": config}))
    return str(prefix)


def rows_of(stream: Any) -> np.ndarray[Any, Any]:
    """Rows by hand."""
    stream = np.asarray(stream)
    count = (len(stream) - 1) // LENGTH
    return np.stack([stream[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(count)])


@pytest.mark.parametrize(
    ("write", "dtype", "given_dtype"),
    [
        (megatron, "uint16", None),
        (megatron, "int32", None),
        (megatron, "int64", None),
        (nanogpt, "uint16", "uint16"),
        (nanogpt, "uint32", "uint32"),
        (llm_c, "uint16", None),
        (llm_c, "uint32", None),
    ],
)
def test_rows_are_those_of_the_stream(
    tmp_path: Path, write: Callable[..., str], dtype: str, given_dtype: str | None
) -> None:
    first, second = documents(12), documents(9)
    sources = [write(tmp_path / name, parts, dtype) for name, parts in (("a", first), ("b", second))]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    text = index_flat(sources, tmp_path / "out", LENGTH, dtype=given_dtype, progress=False)
    rows = TokenShards(tmp_path / "out")
    expected = np.concatenate([rows_of(np.concatenate(first)), rows_of(np.concatenate(second))])
    assert (rows.read(np.arange(len(rows))) == expected).all()
    assert f"{len(expected)} rows of 8 tokens in 2 files" in text
    assert (rows.index.documents, rows.index.end_token) == (21 if write is megatron else 0, None)
    total = sum(part.size for part in [*first, *second])
    assert rows.index.dropped_tokens == total - 2 - rows.index.tokens
    assert verify(tmp_path / "out") == []
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert rows.locate(len(rows_of(np.concatenate(first))) + 1) == "b.bin, row 1, from token 8 on"


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_chunks_of_litdata(tmp_path: Path, dtype: str) -> None:
    parts = documents(14)
    index_flat([litdata(tmp_path / "chunks", parts, dtype)], tmp_path / "out", LENGTH, progress=False)
    rows = TokenShards(tmp_path / "out")
    expected = np.concatenate([rows_of(np.concatenate(parts[number::2])) for number in (0, 1)])
    assert (rows.read(np.arange(len(rows))) == expected).all()
    assert rows.index.documents == 14


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > LENGTH))
def test_any_documents_of_megatron(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    folder = tmp_path_factory.mktemp("any")
    stream = np.arange(sum(sizes))
    source = megatron(folder / "a", np.split(stream, np.cumsum(sizes)[:-1]), "int32")
    index_flat([source], folder / "out", LENGTH, progress=False)
    rows = TokenShards(folder / "out")
    assert (rows.read(np.arange(len(rows))) == rows_of(stream)).all()


def test_training_on_them_and_replaying_them(tmp_path: Path, write_corpus: Callable[..., str]) -> None:
    old = documents(20, 64)
    index_flat([megatron(tmp_path / "old", old)], tmp_path / "index", LENGTH, progress=False)
    content = json.loads((tmp_path / "index/index.json").read_text())
    (tmp_path / "index/index.json").write_text(json.dumps(content | {"tokenizer_sha256": "same"}))
    corpora = {"new": Corpus(write_corpus("new", 30)), "old": Corpus(str(tmp_path / "index"), replay=True)}
    data = TextDataModule("new", corpora, {}, LENGTH, 4, 8, num_workers=1)
    module = fit(data, 10, share=0.25)
    expected = rows_of(np.concatenate(old))
    read = [
        (row, tokens)
        for (corpus, row), tokens in zip(module.rows, np.concatenate(module.tokens), strict=True)
        if corpus
    ]
    assert len(read) == 20
    for row, tokens in read:
        assert (expected[row] == tokens).all()


def test_the_command_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 30)
    train_tokenizer([str(tmp_path / "a.txt")], 270, tmp_path / "tokenizer", progress=False)
    source = megatron(tmp_path / "a", documents(9, 260))
    command = [
        "prepare",
        "index",
        source,
        "--sequence_length",
        "8",
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--out",
    ]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert "tokens in 1 files" in capsys.readouterr().out
    rows = TokenShards(tmp_path / "out")
    assert (rows.index.vocab_size, rows.index.end_token) == (269, 0)
    assert Path(rows.tokenizer_folder, "tokenizer.json").is_file()
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "has an index.json already" in capsys.readouterr().err
    assert main(["prepare", "index", source, "--out", str(tmp_path / "other")]) == 2
    assert "flat files of tokens need --sequence_length" in capsys.readouterr().err
    np.full(50, 299, dtype=np.uint16).tofile(tmp_path / "a.bin")
    assert verify(tmp_path / "out")
    assert main(["prepare", "verify", str(tmp_path / "out")]) == 2


def truncate(path: Path, end: int = -2) -> None:
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / "a.bin"), r"a\.bin: \d+ bytes found, \d+ expected by its \.idx"),
        (
            lambda folder: truncate(folder / "a.idx", 60),
            r"a\.idx: 60 bytes found",
        ),
        (lambda folder: (folder / "a.idx").write_bytes(b"TNTIDX\x00\x00" + b"\0" * 40), r"a\.idx: an index of the old"),
        (lambda folder: (folder / "a.idx").write_bytes(b"something else"), r"a\.idx: not an index of Megatron's"),
        (lambda folder: (folder / "a.idx").unlink(), r"a\.bin: no \.idx next to it .* give --dtype uint16"),
        (lambda folder: megatron(folder / "a", documents(), "float32"), r"a\.idx: the type of the tokens is float32"),
        (lambda folder: megatron(folder / "a", [[1, 2, 3]]), r"a\.bin: 3 tokens fill no row of 9"),
        (lambda folder: megatron(folder / "a", [[1] * 20, [-5] * 20], "int32"), r"a\.bin: token -5 at position 20"),
        (lambda folder: llm_c(folder / "b", documents()) and truncate(folder / "b.bin"), r"b\.bin: \d+ bytes found"),
        (lambda folder: litdata(folder / "c", documents()) and truncate(folder / "c/chunk-0-1.bin"), r"chunk-0-1\.bin"),
    ],
)
def test_files_that_contradict_themselves(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    source = megatron(tmp_path / "a", documents())
    damage(tmp_path)
    sources = [str(tmp_path / "b.bin")] if (tmp_path / "b.bin").exists() else [source]
    if (tmp_path / "c").exists():
        sources = [str(tmp_path / "c")]
    if "b.bin" in sources[0]:
        (tmp_path / "b.idx").unlink(missing_ok=True)
    with pytest.raises(UsageError, match=message) as error:
        index_flat(sources, tmp_path / "out", LENGTH, progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    one, other = megatron(tmp_path / "a", documents()), megatron(tmp_path / "b", documents(), "int32")
    same = megatron(tmp_path / "x/a", documents())
    for sources, message in [
        ([one, other], "has int32 tokens, .* uint16"),
        ([one, same], r"two files are called a\.bin"),
    ]:
        with pytest.raises(UsageError, match=message):
            index_flat(sources, tmp_path / "out", LENGTH, progress=False)


def test_an_index_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    folder = litdata(tmp_path / "chunks", documents())
    with pytest.raises(UsageError, match=r"index\.json is not an index of flat files; choose another --out"):
        index_flat([folder], tmp_path / "chunks", LENGTH, overwrite=True, progress=False)


def test_a_file_that_changed_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    source = megatron(tmp_path / "a", documents())
    index_flat([source], tmp_path / "out", LENGTH, progress=False)
    truncate(Path(source))
    with pytest.raises(UsageError, match=r"a\.bin: \d+ bytes found, \d+ expected"):
        TokenShards(tmp_path / "out").read(np.array([0]))
    assert len(verify(tmp_path / "out")) == 1
