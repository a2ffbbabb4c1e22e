"""Turn texts into tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..sources.documents import Skipped, SourceFile, read

TASK_CHARS = 2**20


class Text(NamedTuple):
    """Part of a document, the number of its stream, and whether it is the last and the first part of the document."""

    stream: int
    text: str
    ends_document: bool
    begins_document: bool = True


def is_held_out(beginning: str, share: float) -> bool:
    """Return whether a document with this beginning (its first piece) is for validation."""
    digest = hashlib.blake2b(beginning.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def texts(files: Iterable[SourceFile], text_field: str, held_out: float, skipped: Skipped) -> Iterator[Text]:
    """Yield the documents of files in pieces; stream 1 has the documents that are held out, stream 0 all others.

    Args:
        files: Files from ``expand``; what a file yields does not depend on those before it.
        text_field: Field of JSON lines or column of Parquet files that has the text.
        held_out: Share of the documents that is held out.
        skipped: Counter of skipped documents.

    Raises:
        UsageError: A file cannot be read; the message says why and where.
    """
    stream, begins = 0, True
    for file in files:
        for piece in read(file, text_field, skipped):
            if begins:
                stream = int(is_held_out(piece.text, held_out))
            yield Text(stream, piece.text, piece.ends_document, begins)
            begins = piece.ends_document


class Tokens(NamedTuple):
    """Tokens of one stream, shape (n,), and the number of documents that end in them."""

    stream: int
    tokens: NDArray[Any]
    documents: int


class Encoder:
    """Encodes tasks with a tokenizer, begin tokens before each document and an end token after it.

    Args:
        tokenizer_json: Contents of ``tokenizer.json``.
        end_token: Number of the end token.
        begin_tokens: Numbers of the begin tokens.
    """

    def __init__(self, tokenizer_json: str, end_token: int, begin_tokens: tuple[int, ...] = ()) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()  # a saved tokenizer may truncate at its model's length
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text and does not end a document
        self.end_token = end_token
        self.begin_tokens = begin_tokens

    def __call__(self, task: list[Text]) -> list[Tokens]:
        """Encode ``task`` and return one result for each stream that it has texts of."""
        parts: dict[int, list[NDArray[Any]]] = {}
        documents: dict[int, int] = {}
        for text in task:
            stream = parts.setdefault(text.stream, [])
            if text.begins_document and self.begin_tokens:
                stream.append(np.array(self.begin_tokens, dtype=np.uint32))
            # One text at a time: an encoding is a hundred times larger than its numbers.
            encoding = self.tokenizer.encode_batch_fast([text.text], add_special_tokens=False)[0]
            stream.append(np.array(encoding.ids, dtype=np.uint32))
            if text.ends_document:
                stream.append(np.array([self.end_token], dtype=np.uint32))
                documents[text.stream] = documents.get(text.stream, 0) + 1
        return [Tokens(number, np.concatenate(part), documents.get(number, 0)) for number, part in parts.items()]


def tasks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Group texts into lists of about ``TASK_CHARS`` characters, which bounds memory."""
    task: list[Text] = []
    size = 0
    for text in texts:
        task.append(text)
        size += len(text.text) + 64  # a million empty lines are work too
        if size >= TASK_CHARS:
            yield task
            task, size = [], 0
    if task:
        yield task


def encode(
    texts: Iterable[Text], tokenizer_json: str, end_token: int, begin_tokens: tuple[int, ...] = ()
) -> Iterator[Tokens]:
    """Yield the tokens of ``texts`` in their order.

    Args:
        texts: Texts, read about ``TASK_CHARS`` characters ahead of what has been yielded.
        tokenizer_json: Contents of ``tokenizer.json``.
        end_token: Number of the end token.
        begin_tokens: Numbers of the begin tokens.
    """
    encoder = _encoder(tokenizer_json, end_token, begin_tokens)
    for task in tasks(texts):
        yield from encoder(task)


@lru_cache(maxsize=1)
def _encoder(tokenizer_json: str, end_token: int, begin_tokens: tuple[int, ...]) -> Encoder:
    """Keep the encoder between units: reading a large vocabulary takes seconds."""
    return Encoder(tokenizer_json, end_token, begin_tokens)
