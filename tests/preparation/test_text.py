"""Preparation of text: tokenizers lose nothing, and any number of workers gives the same shards."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rewurst import UsageError
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.preparation.engine import text_units
from rewurst.preparation.steps.tokenizing import Encoder, Text, Tokens
from rewurst.preparation.text import is_held_out, prepare_text, train_tokenizer, verify

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "fünf", "狗", "barked", "😀", "<|endoftext|>", "ran", "away"]
LENGTH = 16


def text(i: int) -> str:
    words = np.random.default_rng(i).choice(WORDS, size=5 + i % 40)
    return f"Document {i}: {' '.join(words)}.\n"


DOCUMENTS = [text(i) for i in range(300)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "pets.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    assert train_tokenizer([corpus], 300, folder, progress=False) == 300
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stream(folder: Path) -> list[int]:
    """Return the stream of tokens of a corpus, without its dropped tail."""
    rows = TokenShards(folder).read(np.arange(len(TokenShards(folder))))
    return [int(rows[0, 0]), *rows[:, 1:].ravel().tolist()]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=50))
def test_any_text_is_encoded_and_decoded_again(tokenizer: str, text: str) -> None:
    read = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    assert read.decode(read.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_loads_the_tokenizer_and_agrees(tokenizer: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    ours = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    assert (theirs.eos_token, theirs.bos_token, theirs.unk_token) == ("<|endoftext|>",) * 3
    assert theirs.eos_token_id == 0
    assert len(theirs) == 300
    for document in [*DOCUMENTS, "  two  spaces , and ' quotes\n\n\t", "a<|endoftext|>b"]:
        assert theirs(document)["input_ids"] == ours.encode(document).ids
        assert theirs.decode(theirs(document)["input_ids"]) == document


def test_the_same_text_gives_the_same_tokenizer(corpus: str, tokenizer: str, tmp_path: Path) -> None:
    train_tokenizer([corpus], 300, tmp_path / "again", progress=False)
    assert contents(tmp_path / "again") == contents(Path(tokenizer))


def test_a_text_with_too_few_pairs_is_reported(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("abab")
    assert train_tokenizer([str(tmp_path / "a.txt")], 1000, tmp_path / "out", progress=False) < 300
    assert "(1000 asked for; the text has no more pairs to merge)" in capsys.readouterr().err


def test_documents_are_in_order_each_before_an_end_token(corpus: str, tokenizer: str, tmp_path: Path) -> None:
    index = prepare_text([corpus], tokenizer, tmp_path, sequence_length=LENGTH, progress=False)["train"]
    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    encoder.encode_special_tokens = True
    expected = list(itertools.chain.from_iterable([*encoder.encode(document).ids, 0] for document in DOCUMENTS))
    found = stream(tmp_path / "train")
    assert found == expected[: len(found)]
    assert index.dropped_tokens == len(expected) - len(found) < LENGTH
    assert index.documents == len(DOCUMENTS)
    assert index.sources == (corpus,)
    assert found.count(0) == len(DOCUMENTS) - (index.dropped_tokens > 0)  # text that spells the end token ends nothing
    assert not (tmp_path / "val").exists()


def test_the_number_of_workers_changes_no_byte(
    corpus: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_units, "PART_CHARS", 1500)  # some twenty parts
    for workers in (0, 1, 2, 3):
        out = tmp_path / str(workers)
        prepare_text(
            [corpus],
            tokenizer,
            out,
            sequence_length=LENGTH,
            held_out=0.2,
            workers=workers,
            rows_per_shard=256,
            progress=False,
        )
    expected = contents(tmp_path / "0")
    assert "train/pets-000001.tar" in expected
    assert "val/pets-000000.tar" in expected
    for workers in (1, 2, 3):
        assert contents(tmp_path / str(workers)) == expected
    assert verify(tmp_path / "3") == []


def test_validation_documents_are_never_trained_on(tokenizer: str, tmp_path: Path) -> None:
    repeated = [f"{text(i % 120)}" for i in range(360)]  # every document comes three times
    source = tmp_path / "repeated.jsonl"
    source.write_text("".join(json.dumps({"text": document}) + "\n" for document in repeated))
    indices = prepare_text([str(source)], tokenizer, tmp_path / "out", sequence_length=4, held_out=0.3, progress=False)
    decoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    documents = {}
    for side in ("train", "val"):
        whole = decoder.decode(stream(tmp_path / "out" / side), skip_special_tokens=False)
        documents[side] = {part for part in repeated if part in whole}
    assert not documents["train"] & documents["val"]
    assert indices["train"].documents + indices["val"].documents == 360
    assert 0.15 < indices["val"].documents / 360 < 0.45


def test_the_held_out_share_is_the_share_of_hashes() -> None:
    held_out = {share: {d for d in map(text, range(2000)) if is_held_out(d, share)} for share in (0.0, 0.1, 0.3)}
    assert held_out[0.0] == set()
    assert abs(len(held_out[0.1]) / 2000 - 0.1) < 0.03
    assert held_out[0.1] < held_out[0.3]  # a larger share keeps what a smaller one held out


def test_a_document_in_pieces_is_one_document_on_one_side(tokenizer: str, tmp_path: Path) -> None:
    line = "the cat sat on a mat\n"
    (tmp_path / "long.txt").write_text(line * 20000)  # seven pieces
    share = 0.5
    long_side = is_held_out(line * (2**16 // len(line)), share)
    short = next(line * n for n in range(5, 100) if is_held_out(line * n, share) != long_side)
    (tmp_path / "short.txt").write_text(short)
    indices = prepare_text(
        [str(tmp_path)], tokenizer, tmp_path / "out", sequence_length=8, held_out=share, progress=False
    )
    assert sorted(index.documents for index in indices.values()) == [1, 1]
    assert all(stream(tmp_path / "out" / side).count(0) <= 1 for side in indices)


def test_a_saved_limit_of_length_truncates_nothing(tokenizer: str, tmp_path: Path) -> None:
    limited = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    limited.enable_truncation(4)
    limited.enable_padding(length=50)
    plain = Encoder(Path(tokenizer, "tokenizer.json").read_text(), 0)
    task = [Text(0, document, True) for document in DOCUMENTS[:5]]
    np.testing.assert_array_equal(Encoder(limited.to_str(), 0)(task)[0].tokens, plain(task)[0].tokens)


def test_tokenizers_come_from_the_hub_through_transformers(
    corpus: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: {"an/owner": loaded}[name])
    prepare_text([corpus], "an/owner", tmp_path / "hub", sequence_length=LENGTH, progress=False)
    prepare_text([corpus], tokenizer, tmp_path / "folder", sequence_length=LENGTH, progress=False)
    assert stream(tmp_path / "hub/train") == stream(tmp_path / "folder/train")
    copy = transformers.AutoTokenizer.from_pretrained
    monkeypatch.undo()
    assert copy is not transformers.AutoTokenizer.from_pretrained
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hub/train/tokenizer").eos_token_id == 0


def test_a_tokenizer_missing_from_the_hub(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(
            f"{name} is not a local folder and is not a valid model identifier\nIf this is a private one, ..."
        )

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
    with pytest.raises(
        UsageError, match=r"tokenizer gtp2: no such folder, and the hub gave none \(gtp2 is not"
    ) as error:
        prepare_text([corpus], "gtp2", tmp_path / "out", progress=False)
    assert "\n" not in str(error.value)


def test_summary_lists_the_corpora_and_skipped_files(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, document in enumerate(["", *DOCUMENTS[:20]]):
        (tmp_path / f"{i:02d}.txt").write_text(document)
    (tmp_path / "image.png").write_bytes(b"")
    prepare_text([str(tmp_path)], tokenizer, tmp_path / "out", sequence_length=LENGTH)
    shown = capsys.readouterr().err
    assert "tokenizing" in shown
    assert f"{tmp_path}/out/train: 20 documents, " in shown
    assert "1 files of unknown kind, or links to folders, skipped" in shown
    assert "1 empty documents skipped" in shown


def edit_settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damaged_tokenizers(tokenizer: str, folder: Path) -> dict[str, str]:
    """Return folders with one fault each and the expected message."""
    names = ("none", "broken", "endless", "stranger")
    none, broken, endless, stranger = (Path(shutil.copytree(tokenizer, folder / name)) for name in names)
    (none / "tokenizer.json").unlink()
    (broken / "tokenizer.json").write_text("{}")
    edit_settings(endless, eos_token=None)
    edit_settings(stranger, eos_token="</s>")
    return {
        str(none): "none: no tokenizer.json; `rewurst prepare tokenizer SOURCE... --out DIR` makes one",
        str(broken): r"broken: tokenizer.json cannot be read \(",
        str(endless): "endless: no end token; set eos_token in its tokenizer_config.json",
        str(stranger): "stranger: end token '</s>' is not in its vocabulary",
        str(folder / "borken"): r"borken: no such folder; did you mean .*/broken\?",
        str(none / "tokenizer_config.json"): "is a file, expected the folder that contains tokenizer.json",
    }


def test_tokenizers_that_cannot_be_used(corpus: str, tokenizer: str, tmp_path: Path) -> None:
    for name, message in damaged_tokenizers(tokenizer, tmp_path / "tokenizers").items():
        with pytest.raises(UsageError, match=message) as error:
            prepare_text([corpus], name, tmp_path / "out", progress=False)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 1.0}, "held_out is 1.0, expected a share of the documents from 0 to below 1"),
        ({"held_out": float("nan")}, "held_out is nan"),
        ({"workers": -1}, "workers is -1, expected 0 or more"),
        ({"sequence_length": 0}, "sequence_length is 0, expected 1 or more"),
        ({"rows_per_shard": 300}, "rows_per_shard is 300, expected a multiple of 256 such as 256"),
        ({"sequence_length": 10**5}, r"out/train: \d+ tokens fill no row of 100001; give more text"),
        (
            {"held_out": 0.01, "sequence_length": 512},
            r"out/val: \d+ tokens fill no row of 513; .* \(held_out is 0.01\)",
        ),
        ({"text_field": "body"}, "no field 'body'; --text_field can be one of: text"),
    ],
)
def test_a_failed_preparation_leaves_no_corpus(
    corpus: str, tokenizer: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_text([corpus], tokenizer, tmp_path / "out", progress=False, **changes)
    assert {Path(name).parts[1] for name in contents(tmp_path)} <= {".preparing"}


def test_an_interrupted_preparation_leaves_no_index_and_resumes(
    corpus: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"sequence_length": LENGTH, "held_out": 0.2, "rows_per_shard": 256, "progress": False}
    prepare_text([corpus], tokenizer, tmp_path / "undisturbed", **asked)
    monkeypatch.setattr(text_units, "PART_CHARS", 1500)
    encode, encoded = text_units.encode, 0

    def interrupted(*arguments: Any) -> Iterator[Tokens]:
        nonlocal encoded
        encoded += 1
        if encoded == 5:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(text_units, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_text([corpus], tokenizer, tmp_path / "out", **asked)
    assert not list((tmp_path / "out").rglob("index.json"))
    assert len(list((tmp_path / "out/.preparing/tokens").glob("*.json"))) == 4
    with pytest.raises(UsageError, match=r"was started with sequence_length 16, not 8: give the same value to resume"):
        prepare_text([corpus], tokenizer, tmp_path / "out", **{**asked, "sequence_length": 8})
    prepare_text([corpus], tokenizer, tmp_path / "out", **asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    resumed, encoded = encoded - 5, 5
    prepare_text([corpus], tokenizer, tmp_path / "again", **asked)
    assert encoded - 5 == resumed + 4, "the four parts that were done were not done again"


def test_a_full_disk_is_one_line_and_the_same_call_resumes(
    corpus: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(text_units.os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
        prepare_text([corpus], tokenizer, tmp_path / "out", sequence_length=LENGTH, progress=False)
    monkeypatch.undo()
    prepare_text([corpus], tokenizer, tmp_path / "out", sequence_length=LENGTH, progress=False)
    assert verify(tmp_path / "out") == []


def test_other_options_start_over_while_nothing_is_done(corpus: str, tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no field 'body'"):
        prepare_text([corpus], tokenizer, tmp_path / "out", text_field="body", progress=False)
    prepare_text([corpus], tokenizer, tmp_path / "out", sequence_length=LENGTH, progress=False)
    assert verify(tmp_path / "out") == []


def test_only_prepared_folders_are_overwritten(corpus: str, tokenizer: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_text([corpus], tokenizer, out, sequence_length=8, held_out=0.2, progress=False)
    with pytest.raises(UsageError, match="out is not empty; choose another folder or add --overwrite"):
        prepare_text([corpus], tokenizer, out, progress=False)
    # The tokenizer that is used may be the copy in the very folder.
    prepare_text([corpus], str(out / "train/tokenizer"), out, sequence_length=LENGTH, overwrite=True, progress=False)
    assert not (out / "val").exists()
    assert verify(out) == []
    (out / "train/thesis.tex").write_text("years of work")
    with pytest.raises(
        UsageError, match=r"out has train/thesis\.tex, which preparation does not make: not overwritten"
    ):
        prepare_text([corpus], tokenizer, out, overwrite=True, progress=False)
    assert (out / "train/thesis.tex").exists()


def test_only_tokenizers_are_overwritten(corpus: str, tokenizer: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tokenizer, tmp_path / "out"))
    with pytest.raises(UsageError, match="out is not empty"):
        train_tokenizer([corpus], 280, out, progress=False)
    assert train_tokenizer([corpus], 280, out, overwrite=True, progress=False) == 280
    (out / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"out holds notes\.txt"):
        train_tokenizer([corpus], 280, out, overwrite=True, progress=False)
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        train_tokenizer([corpus], 280, out / "notes.txt", progress=False)
    with pytest.raises(UsageError, match="vocab_size is 256, expected 257 or more: 256 bytes and the end token"):
        train_tokenizer([corpus], 256, out, progress=False)


def test_errors_in_sources_pass_through_the_trainer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"a\.txt: byte 0 \(0xff\) is not valid UTF-8"):
        train_tokenizer([str(tmp_path)], 300, tmp_path / "out", progress=False)


def test_verify_reads_every_corpus_in_a_folder(corpus: str, tokenizer: str, tmp_path: Path) -> None:
    prepare_text([corpus], tokenizer, tmp_path, sequence_length=LENGTH, held_out=0.2, progress=False)
    (tmp_path / "val/tokenizer/tokenizer.json").write_text("another")
    (tmp_path / "train/pets-000000.idx").unlink()
    problems = verify(tmp_path)
    assert len(problems) == 2
    assert "train/pets-000000.idx: missing" in problems[0]
    assert "val/tokenizer/tokenizer.json: SHA-256 is " in problems[1]
