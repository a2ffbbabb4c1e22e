"""Count characters that a tokenizer does not know: they become an unknown token, or vanish."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from ... import UsageError

LOOKED_AT = 4096  # characters encoded at a time to find the first unknown one
SETTLED_TOKENS = 10**6


class UnknownCharacters:
    """Finds what a tokenizer does not know.

    Args:
        tokenizer: Tokenizer.
        content: Contents of its ``tokenizer.json``.
    """

    def __init__(self, tokenizer: Tokenizer, content: str) -> None:
        self._tokenizer = tokenizer
        saved = json.loads(content)
        model = saved["model"]
        unknown = model.get("unk_token")
        self._unknown: int | None = tokenizer.token_to_id(unknown) if unknown else model.get("unk_id")
        # A BPE without an unknown token leaves out what it does not know.
        self._vocabulary = set(model["vocab"]) if _loses(saved, self._unknown) else None
        self._affixes = (model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or "")
        self._seen, self._vanishing = set[str](), set[str]()

    def count(self, text: str, tokens: NDArray[Any], overlap: int = 0) -> int:
        """Return the number of unknown tokens and of characters that have vanished.

        Args:
            text: Text that was encoded.
            tokens: Its tokens.
            overlap: Number of characters at the beginning that another text has too.
        """
        found = 0 if self._unknown is None else int(np.count_nonzero(tokens == self._unknown))
        return found + sum(text.count(character, overlap) for character in self._lost(text))

    def first(self, text: str) -> str:
        """Return the first characters of a text that the tokenizer does not know, for messages."""
        lost = self._lost(text)
        if lost:
            return _named(min(lost, key=text.find))
        for begin in range(0, len(text), LOOKED_AT):
            part = text[begin : begin + LOOKED_AT]
            encoding = self._tokenizer.encode(part, add_special_tokens=False)
            if self._unknown in encoding.ids:
                start, end = encoding.offsets[encoding.ids.index(self._unknown)]
                return _named(part[start:end].strip()[:20])
        return "a word"

    def _lost(self, text: str) -> set[str]:
        if self._vocabulary is None:
            return set()
        characters = set(text)
        for character in characters - self._seen:
            if self._vanishes(character):
                self._vanishing.add(character)
            self._seen.add(character)
        return characters & self._vanishing

    def _vanishes(self, character: str) -> bool:
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = normalizer.normalize_str(character) if normalizer else character
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        return not all(self._knows(symbol) for piece in pieces for symbol in piece)

    def _knows(self, symbol: str) -> bool:
        assert self._vocabulary is not None
        prefix, suffix = self._affixes
        return any(form in self._vocabulary for form in (symbol, prefix + symbol, symbol + suffix))


def too_many(count: int, tokens: int, first: str, most: float, final: bool) -> None:
    """Raise if too much of a text is unknown to its tokenizer.

    Args:
        count: Number of unknown tokens and of characters that have vanished.
        tokens: Number of tokens.
        first: First unknown characters.
        most: Share that may be unknown.
        final: Whether there is no more text; before that a share of a few tokens means little.

    Raises:
        UsageError: There are too many.
    """
    if count > most * (tokens + count) and (final or tokens >= SETTLED_TOKENS):
        raise UsageError(
            f"{summary(count, tokens, first)}, more than max_unknown {most} allows; take a tokenizer that was trained "
            "on such text"
        )


def summary(count: int, tokens: int, first: str) -> str:
    """Return how much is unknown in one line."""
    share = count / max(1, tokens + count)
    return f"the tokenizer does not know {share:.2%} of the text ({count} places, the first: {first})"


def _named(characters: str) -> str:
    codes = " ".join(f"U+{ord(character):04X}" for character in characters[:1])
    return f"{characters!r} ({codes})" if len(characters) == 1 else repr(characters)


def _loses(saved: dict[str, Any], unknown: int | None) -> bool:
    model = saved["model"]
    if model.get("type") != "BPE" or unknown is not None:
        return False
    vocabulary = model["vocab"]
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return False
    bytewise = "ByteLevel" in _types(saved.get("pre_tokenizer")) | _types(saved.get("normalizer"))
    return not (bytewise and all(symbol in vocabulary for symbol in pre_tokenizers.ByteLevel.alphabet()))


def _types(part: dict[str, Any] | None) -> set[str]:
    """Return the types of a component of a tokenizer and of those that it consists of."""
    if not part:
        return set()
    inner: Iterable[dict[str, Any]] = part.get("pretokenizers") or part.get("normalizers") or ()
    return {part["type"]}.union(*(_types(one) for one in inner))
