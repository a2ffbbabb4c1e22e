"""A document has the same tokens however it is split into windows, sections and work units."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rewurst import UsageError
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.preparation.engine import text_units
from rewurst.preparation.sources import documents
from rewurst.preparation.steps import seams, sections
from rewurst.preparation.steps.seams import encode_whole
from rewurst.preparation.text import prepare_text

WORDS = [
    "configs/continual",
    "the",
    "river",
    "Straße",
    "東京は",
    "naïve",
    "  ",
    "\n\n",
    "\n",
    "😀",
    "a-b",
    "aaaa",
    "x1",
    ".",
]


def prose(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", "", "\n"]) for _ in range(words))


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """Return a tokenizer like Llama 2's and Gemma's: no words, one space in front, all spaces replaced."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


KINDS = {f.__name__: f for f in (byte_level, sentencepiece_bpe, metaspace, unigram, word_piece)}


def trained(kind: Callable[[], Tokenizer]) -> Tokenizer:
    tokenizer = kind()
    options = {"vocab_size": 400, "special_tokens": ["<unk>", "<s>"], "show_progress": False}
    if kind is byte_level:
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    texts = [prose(1000 + i, 200) for i in range(8)]
    if kind is unigram:
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        trainer = (trainers.WordPieceTrainer if kind is word_piece else trainers.BpeTrainer)(**options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[*KINDS])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(KINDS[request.param])


def test_windows_do_not_change_tokens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "WINDOW_CHARS", 400)
    monkeypatch.setattr(seams, "OVERLAP_CHARS", 100)
    sizes = []

    def encode(text: str) -> list[int]:
        sizes.append(len(text))
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    for seed in range(12):
        text = prose(seed, 900)
        assert encode_whole(text, encode) == tokenizer.encode(text, add_special_tokens=False).ids
    assert np.median(sizes) <= 500  # it was not all encoded at once


@pytest.mark.parametrize(
    "text", ["b" + "a" * 3000, "a" * 3001, " " * 3000 + "x", "東" * 2000, "ab" * 999 + "c\n" * 999]
)
def test_windows_do_not_change_tokens_of_repeated_text(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seams, "WINDOW_CHARS", 300)
    monkeypatch.setattr(seams, "OVERLAP_CHARS", 60)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    assert encode_whole(text, encode) == encode(text)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_long_document_is_prepared_as_one_text(
    tmp_path: Path, suffix: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in [
        (seams, "WINDOW_CHARS", 300),
        (seams, "OVERLAP_CHARS", 60),
        (sections, "SECTION_CHARS", 2000),
        (documents, "PIECE_CHARS", 500),
        (text_units, "PART_CHARS", 1000),
    ]:
        monkeypatch.setattr(module, name, value)
    tokenizer = trained(sentencepiece_bpe)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    whole = [prose(7, 6000), "short", prose(8, 3000)]
    (tmp_path / "in").mkdir()
    for i, text in enumerate(whole):
        content = text if suffix == ".txt" else json.dumps({"text": text}) + "\n"
        (tmp_path / f"in/{i}{suffix}").write_text(content, encoding="utf8", newline="")
    prepare_text(
        [str(tmp_path / "in")],
        str(tmp_path / "tokenizer"),
        tmp_path / "out",
        sequence_length=8,
        workers=workers,
        max_unknown=1,
        progress=False,
    )
    expected = [token for text in whole for token in [*tokenizer.encode(text, add_special_tokens=False).ids, 1]]
    rows = TokenShards(tmp_path / "out/train")
    tokens = rows.read(np.arange(len(rows)))
    found = [int(tokens[0, 0]), *tokens[:, 1:].ravel().tolist()]
    assert found == expected[: len(found)]
    assert len(expected) - len(found) < 8


def test_a_document_that_cannot_be_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "SECTION_CHARS", 3000)
    monkeypatch.setattr(sections, "MOST_CHARS", 6000)
    monkeypatch.setattr(seams, "OVERLAP_CHARS", 60)
    pieces = (documents.Piece("a" * 500, False) for _ in range(100))

    def encode(text: str) -> list[int]:
        return [len(text)]  # one token for any text, as an unknown word

    with pytest.raises(UsageError, match="has no place to split, such as 'aaaa"):
        list(sections.sections(pieces, 0.0, encode))
