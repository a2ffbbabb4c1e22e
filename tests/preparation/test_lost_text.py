"""Unusable text is counted, named and bounded: bad documents, damaged files, unknown characters."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from rewurst import UsageError
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.preparation.text import prepare_text
from rewurst.preparation.tokenizer import train_tokenizer
from rewurst.train import main

GERMAN = "Die Größe der Ährenfelder"


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("the cat sat on the mat " * 20)
    train_tokenizer([str(folder / "a.txt")], 270, folder / "bpe", progress=False)
    return str(folder / "bpe")


def lines(folder: Path, name: str, bad: int = 0, count: int = 40) -> Path:
    path = folder / name
    good = [json.dumps({"text": f"{name}: document {i}"}) for i in range(count - bad)]
    path.write_text("\n".join([*good, *['{"text": "never closed'] * bad]) + "\n")
    return path


def documents(folder: Path, tokenizer: str) -> list[str]:
    rows = TokenShards(folder)
    tokens = rows.read(np.arange(len(rows)))
    text = Tokenizer.from_file(f"{tokenizer}/tokenizer.json").decode(
        [int(tokens[0, 0]), *tokens[:, 1:].ravel().tolist()], skip_special_tokens=False
    )
    return text.split("<|endoftext|>")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_one_bad_line_in_the_last_of_many_files_loses_one_document(
    tmp_path: Path, bytewise: str, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(8):
        lines(tmp_path / "in", f"{i}.jsonl", bad=int(i == 7))
    options = ["--tokenizer", bytewise, "--sequence_length", "4", "--workers", workers, "--out", str(tmp_path / "out")]
    assert main(["prepare", "text", str(tmp_path / "in"), *options]) == 0
    expected = [f"{i}.jsonl: document {k}" for i in range(8) for k in range(40 - int(i == 7))]
    assert documents(tmp_path / "out/train", bytewise)[:318] == expected[:318]  # the tail fills no row
    error = capsys.readouterr().err
    assert "1 of 320 documents are corrupt and skipped" in error
    assert "7.jsonl:40: not valid JSON (Invalid control character" in error
    index = json.loads((tmp_path / "out/train/index.json").read_text())
    assert index["documents"] == 319


def test_too_many_bad_lines_are_refused_and_a_higher_bound_resumes(
    tmp_path: Path, bytewise: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path, "a.jsonl", bad=4)
    command = ["prepare", "text", str(path), "--tokenizer", bytewise, "--sequence_length", "4", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "4 of 40 documents are corrupt, more than max_corrupt 0.05 allows; the first: " in error
    done = sorted(path.name for path in (tmp_path / "out/.preparing/tokens").iterdir())
    assert done  # what was done stays
    assert main([*command, str(tmp_path / "out"), "--max_corrupt", "0.2"]) == 0
    assert "4 of 40 documents are corrupt and skipped" in capsys.readouterr().err
    assert len(documents(tmp_path / "out/train", bytewise)) >= 36


def test_a_bad_text_file_among_many_is_left_out(
    tmp_path: Path, bytewise: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(f"document {i}")
    (folder / "03.txt").write_bytes(b"caf\xe9")
    (folder / "04.txt.gz").write_bytes(gzip.compress(b"document")[:-5])
    prepare_text([str(folder)], bytewise, tmp_path / "out", sequence_length=4, progress=False)
    error = capsys.readouterr().err
    assert "2 files are damaged and read as far as possible" in error
    assert "03.txt: byte 3 (0xe9) is not valid UTF-8" in error
    assert "04.txt.gz: truncated or damaged .gz file" in error
    assert documents(tmp_path / "out/train", bytewise)[:4] == ["document 0", "document 1", "document 2", "document 4"]
    with pytest.raises(UsageError, match="bytes are in damaged files, more than max_corrupt"):
        prepare_text([str(folder)], bytewise, tmp_path / "2", sequence_length=4, max_corrupt=0.01, progress=False)


@pytest.mark.parametrize("name", ["max_corrupt", "max_unknown"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_bounds_out_of_range(tmp_path: Path, bytewise: str, name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}, expected a share from 0 to 1"):
        prepare_text([str(tmp_path)], bytewise, tmp_path / "out", **{name: value})  # type: ignore[arg-type]


def saved(tokenizer: Tokenizer, folder: Path, model: str = "bpe") -> str:
    options = {"vocab_size": 100, "special_tokens": ["<unk>", "</s>"], "show_progress": False}
    trainer = {"bpe": trainers.BpeTrainer, "unigram": trainers.UnigramTrainer, "wordpiece": trainers.WordPieceTrainer}
    unknown = {"unk_token": "<unk>"} if model == "unigram" else {}
    text = "Die Grosse der Felder und der Reste, Zeile um Zeile. ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz"
    tokenizer.train_from_iterator([text] * 20, trainer[model](**options, **unknown))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return str(folder)


def vanishing() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())  # without an unknown token, unknown characters vanish
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def bytes_missing() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer


def unknown_token() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def lowered() -> Tokenizer:
    """Text removed by a normalizer is not counted as lost."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("build", "model", "places", "first"),
    [
        (vanishing, "bpe", 3, "'ö' (U+00F6)"),
        (bytes_missing, "bpe", 3, "'ö' (U+00F6)"),
        (unknown_token, "bpe", 3, "'ö' (U+00F6)"),
        (unigram, "unigram", 2, "'öß'"),
        (wordpiece, "wordpiece", 2, "'Größe'"),
        (lowered, "bpe", 1, "'ß' (U+00DF)"),
    ],
)
def test_characters_that_a_tokenizer_does_not_know(
    tmp_path: Path, build: object, model: str, places: int, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(build)
    tokenizer = saved(build(), tmp_path / "tokenizer", model)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("Felder und der Reste " * 3)
    (tmp_path / "in/b.txt").write_text(GERMAN)
    (tmp_path / "in/c.txt").write_text("Felder und der Reste " * 3)
    options = {"sequence_length": 4, "progress": False}
    with pytest.raises(UsageError) as error:
        prepare_text([str(tmp_path / "in")], tokenizer, tmp_path / "out", **options)  # type: ignore[arg-type]
    message = str(error.value)
    assert "the tokenizer does not know " in message
    assert "more than max_unknown 0.01 allows; take a tokenizer" in message
    assert first in message
    assert "\n" not in message
    prepare_text([str(tmp_path / "in")], tokenizer, tmp_path / "out", max_unknown=0.2, **options)  # type: ignore[arg-type]
    assert f"({places} places, the first: {first})" in capsys.readouterr().err


def test_a_tokenizer_of_all_bytes_knows_everything(
    tmp_path: Path, bytewise: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(GERMAN + " 東京 \x00 \U0001f600")
    prepare_text([str(tmp_path)], bytewise, tmp_path / "out", sequence_length=4, max_unknown=0, progress=False)
    assert "does not know" not in capsys.readouterr().err


def test_one_file_is_one_document_unless_something_separates_them(
    tmp_path: Path, bytewise: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kjv.txt"
    path.write_text("\n\n".join(f"Verse {i} of the book." for i in range(200)))
    command = ["prepare", "text", str(path), "--tokenizer", bytewise, "--sequence_length", "16", "--out"]
    assert main([*command, str(tmp_path / "one"), "--held_out", "0.05"]) == 2
    error = capsys.readouterr().err
    assert "val: none of the 1 documents is here with held_out 0.05" in error
    assert "a plain text file is one document unless --document_separator says" in error
    assert main([*command, str(tmp_path / "two"), "--held_out", "0.05", "--document_separator", "blank-line"]) == 0
    indices = [json.loads((tmp_path / "two" / side / "index.json").read_text()) for side in ("train", "val")]
    assert sum(index["documents"] for index in indices) == 200
    assert documents(tmp_path / "two/train", bytewise)[0] == "Verse 0 of the book."


def test_a_separator_needs_a_plain_text_file(tmp_path: Path, bytewise: str) -> None:
    path = lines(tmp_path, "a.jsonl")
    with pytest.raises(UsageError, match=r"document_separator is '---', but no source is a \.txt or \.md"):
        prepare_text([str(path)], bytewise, tmp_path / "out", document_separator="---")


def test_a_separator_on_a_line_of_its_own(tmp_path: Path, bytewise: str) -> None:
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n---\nthree")
    prepare_text(
        [str(tmp_path)], bytewise, tmp_path / "out", sequence_length=2, document_separator="\\n---\\n", progress=False
    )
    assert documents(tmp_path / "out/train", bytewise)[:2] == ["one", "two"]


def test_help_explains_documents_and_compressed_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", "text", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "A document is a line of .jsonl" in text
    assert "or a whole .txt or .md file" in text
    assert ".txt, .md, .jsonl, .json, .csv, .tsv, also with .gz, .zst, .bz2 or .xz; .parquet, .arrow" in text
    assert "--document_separator" in text
