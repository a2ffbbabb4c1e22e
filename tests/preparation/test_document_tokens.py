"""Tokens before and after documents: as the tokenizer's model was trained, recorded, and used everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rewurst import UsageError
from rewurst.datamodules.corpora.tokens import TokenIndex, TokenShards
from rewurst.preparation.text import prepare_text
from rewurst.tokenizer_files import load_tokenizer
from rewurst.tokenizer_meaning import same_tokenizer

SPECIALS = ("<pad>", "<s>", "<|endoftext|>", "<|im_end|>")


def write_tokenizer(folder: Path, settings: dict[str, Any], begin: str | None = None, **changes: Any) -> Path:
    vocab = {token: number for number, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, [], **changes))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    if begin:
        template = {"single": f"{begin} $A", "special_tokens": [(begin, vocab[begin])]}
        tokenizer.post_processor = processors.TemplateProcessing(**template)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**defaults, **settings}))
    return folder


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    texts = ["one", "two and more words " * 40, "three"] * 3
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stream(folder: Path) -> list[int]:
    shards = TokenShards(folder)
    rows = shards.read(np.arange(len(shards)))
    return [int(rows[0, 0]), *rows[:, 1:].flatten().tolist()]


@pytest.mark.parametrize(
    ("settings", "template", "begin"),
    [
        ({}, None, ()),
        ({}, "<s>", (1,)),
        ({"add_bos_token": True}, None, ()),  # transformers goes by the post-processor, and so do we
        ({"add_bos_token": False}, "<s>", (1,)),
        ({"bos_token": "<pad>"}, "<pad>", (0,)),
    ],
)
def test_documents_begin_as_the_tokenizer_says(
    documents: Path, tmp_path: Path, settings: dict[str, Any], template: str | None, begin: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from transformers import AutoTokenizer

    monkeypatch.setattr("rewurst.preparation.sources.documents.PIECE_CHARS", 100)  # a document in several pieces
    folder = write_tokenizer(tmp_path / "tokenizer", settings, template)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs("one")["input_ids"][: len(begin)] == list(begin)
    assert len(theirs("one")["input_ids"]) == len(begin) + 3
    prepare_text([str(documents)], str(folder), tmp_path / "out", sequence_length=16, progress=False)
    index = TokenIndex.load(tmp_path / "out" / "train")
    assert (index.begin_tokens, index.end_token) == (begin, 2)
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    expected = [token for text in texts for token in [*theirs(text)["input_ids"], 2]]
    found = stream(tmp_path / "out" / "train")
    assert found == expected[: len(found)]


def test_an_index_without_begin_tokens_is_one_without_any(documents: Path, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", {})
    prepare_text([str(documents)], str(folder), tmp_path / "out", sequence_length=16, progress=False)
    path = tmp_path / "out" / "train" / "index.json"
    before = TokenIndex.load(path.parent)
    content = json.loads(path.read_text())
    assert "begin_tokens" not in content
    path.write_text(json.dumps(content))
    assert TokenIndex.load(path.parent).begin_tokens == ()
    assert TokenIndex.load(path.parent).fingerprint() == before.fingerprint()
    path.write_text(json.dumps({**content, "begin_tokens": ["a"]}))
    with pytest.raises(UsageError, match=r"begin_tokens is \['a'\], expected a list of whole numbers"):
        TokenIndex.load(path.parent)


@pytest.mark.parametrize(
    ("eos", "given", "expected"),
    [("<|endoftext|>", None, 2), ("<|im_end|>", None, 2), ("<|im_end|>", "<|im_end|>", 3), ("<|im_end|>", "<s>", 1)],
)
def test_the_token_after_documents(
    documents: Path, tmp_path: Path, eos: str, given: str | None, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", {"eos_token": eos})
    prepare_text([str(documents)], str(folder), tmp_path / "out", sequence_length=16, progress=False, end_token=given)
    assert TokenIndex.load(tmp_path / "out" / "train").end_token == expected
    assert f"end token {SPECIALS[expected]!r} ({expected}), no begin token" in capsys.readouterr().err


def test_a_missing_end_token(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", {})
    with pytest.raises(UsageError, match=r"end_token '<\|endoftexts\|>' is not in its vocabulary; did you mean"):
        load_tokenizer(str(folder), "<|endoftexts|>")


def test_tokenizers_that_mean_the_same(tmp_path: Path) -> None:
    one = (write_tokenizer(tmp_path / "one", {}) / "tokenizer.json").read_text()
    content = json.loads(one)
    rewritten = {**content, "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                                           "stride": 0}}  # fmt: skip
    assert same_tokenizer(one, json.dumps(rewritten, indent=4))
    begins = (write_tokenizer(tmp_path / "begins", {}, "<s>") / "tokenizer.json").read_text()
    assert same_tokenizer(one, begins), "what goes before documents is recorded by itself"
    swapped = json.loads(one)
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    assert not same_tokenizer(one, json.dumps(swapped))
    tokenizer = Tokenizer.from_str(one)
    tokenizer.normalizer = normalizers.Lowercase()
    assert not same_tokenizer(one, tokenizer.to_str())
    tokenizer = Tokenizer.from_str(one)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not same_tokenizer(one, tokenizer.to_str())


def test_corpora_of_two_versions_of_a_tokenizer_go_together(documents: Path, tmp_path: Path) -> None:
    folders = [write_tokenizer(tmp_path / name, {}) for name in "ab"]
    content = json.loads((folders[1] / "tokenizer.json").read_text())
    (folders[1] / "tokenizer.json").write_text(json.dumps(content))
    paths = []
    for folder in folders:
        out = tmp_path / f"out-{folder.name}"
        prepare_text([str(documents)], str(folder), out, sequence_length=16, progress=False)
        paths.append(out / "train")
    first, second = (TokenShards(path) for path in paths)
    assert first.index.tokenizer_sha256 != second.index.tokenizer_sha256
    assert first.has_tokenizer_of(second)
    content["model"]["vocab"] |= {"a": content["model"]["vocab"]["b"], "b": content["model"]["vocab"]["a"]}
    (paths[1] / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    assert not first.has_tokenizer_of(TokenShards(paths[1]))


def test_a_folder_of_vocabulary_and_merges(tmp_path: Path) -> None:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<|endoftext|>", *symbols, "th", "the"])}
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    read = load_tokenizer(str(folder))
    assert Tokenizer.from_str(read.json).encode("the").ids == [vocab["the"]]
    assert (read.end_token, read.vocab_size) == (0, len(vocab))
