"""Tokens of documents as a stream, for data modules that read text as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...tokenizer_files import TokenizerFiles
from ..sources.documents import Piece
from .sections import sections
from .tokenizing import encode, encoder_of
from .unknown import too_many

MAX_UNKNOWN = 0.01


def token_stream(texts: Iterable[str], tokenizer: TokenizerFiles) -> Iterator[NDArray[np.uint32]]:
    """Yield the tokens of documents in pieces, with the tokens around each document; empty ones are left out.

    Args:
        texts: Documents.
        tokenizer: Tokenizer.

    Raises:
        UsageError: The tokenizer does not know too much of the text.
    """
    encoder = encoder_of(tokenizer.json, tokenizer.end_token, tokenizer.begin_tokens)
    pieces = (Piece(text, ends_document=True) for text in texts if text and not text.isspace())
    tokens: Any = 0
    unknown, first = 0, ""
    for part in encode(sections(pieces, 0.0, encoder.at_once), encoder):
        tokens, unknown, first = tokens + part.tokens.size, unknown + part.unknown, first or part.first_unknown
        too_many(unknown, tokens, first, MAX_UNKNOWN, final=False)
        yield part.tokens
    too_many(unknown, tokens, first, MAX_UNKNOWN, final=True)
