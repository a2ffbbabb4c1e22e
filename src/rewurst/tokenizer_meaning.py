"""Compare tokenizers by what they do, not by the bytes of their files."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

from .tokenizer_files import parse_tokenizer

PROBES = (
    "The quick brown fox, it's 3.14159 & 1,000,000!",
    " leading and  double   spaces\t\ttabs\r\n\n\nlines ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # \u00fcber",
    "Na\u00efve caf\u00e9 vs. Nai\u0308ve cafe\u0301",
    "\u0391\u03b8\u03ae\u03bd\u03b1 \u041c\u043e\u0441\u043a\u0432\u0430",
    "\u6771\u4eac\u3068\u5317\u4eac \uff21\uff11 \ud55c\uad6d\uc5b4",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600\u200d\U0001f525 \ufb01 \u00bd \u2122 \u0000",
    "<|endoftext|></s><s><unk> [CLS] <bos>",
    "HTTPServerError XMLHttpRequest snake_case_name CamelCase",
)
"""Texts whose tokens tell tokenizers apart."""


def same_tokenizer(one: str, other: str) -> bool:
    """Return whether two ``tokenizer.json`` mean the same, whatever version of the library wrote them.

    They do if they have the same vocabulary and merges, and the same normal form and tokens for probe strings.

    Args:
        one: Contents of a ``tokenizer.json``.
        other: Contents of another.
    """
    return one == other or _meaning(one) == _meaning(other)


@lru_cache(maxsize=4)
def _meaning(content: str) -> str:
    tokenizer = parse_tokenizer(content, "tokenizer")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = json.loads(content).get("model", {})
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    normalizer = tokenizer.normalizer
    tokens = []
    for specials_are_text in (False, True):
        tokenizer.encode_special_tokens = specials_are_text
        tokens += [tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES]
    values = [
        sorted(tokenizer.get_vocab(with_added_tokens=True).items()),
        merges,
        [normalizer.normalize_str(text) if normalizer else text for text in PROBES],
        tokens,
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
