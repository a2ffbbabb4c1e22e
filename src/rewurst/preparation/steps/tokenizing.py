"""Turn texts into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..sources.documents import SourceFile, read
from ..sources.skipped import Skipped
from ..writing.row_layout import UNPREDICTED
from .seams import encode_whole, without_joints
from .sections import Text, sections
from .unknown import UnknownCharacters

TASK_CHARS = 2**20


def texts(
    files: Iterable[SourceFile],
    text_field: str,
    held_out: float,
    skipped: Skipped,
    encoder: Encoder,
    separator: str | None = None,
    prompt_field: str | None = None,
) -> Iterator[Text]:
    """Yield the documents of files, long ones in parts; stream 1 has those that are held out, stream 0 all others.

    Args:
        files: Files from ``expand``; what a file yields does not depend on those before it.
        text_field: Field of JSON lines or column of Parquet files that has the text.
        held_out: Share of the documents that is held out.
        skipped: Counter of skipped documents.
        encoder: Encoder that tells where a long document can be split.
        separator: What separates the documents of a plain text file (default: the file is one document).
        prompt_field: Field of JSON objects with the beginning of the document that is not to be predicted.

    Raises:
        UsageError: A file cannot be read; the message says why and where.
    """
    for file in files:
        yield from sections(read(file, text_field, skipped, separator, prompt_field), held_out, encoder.at_once)


class Tokens(NamedTuple):
    """Tokens of one stream, shape (n,), and the number of documents that end in them.

    Attributes:
        stream: Number of the stream.
        tokens: Tokens, (n,).
        documents: Number of documents that end in them.
        unknown: Number of places with characters that the tokenizer does not know.
        first_unknown: The first such characters, empty if there are none.
    """

    stream: int
    tokens: NDArray[Any]
    documents: int
    unknown: int = 0
    first_unknown: str = ""


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
        self._unknown = UnknownCharacters(self.tokenizer, tokenizer_json)

    def at_once(self, text: str) -> list[int]:
        """Return the tokens of a text that is not too long."""
        # One text at a time: an encoding is a hundred times larger than its numbers.
        ids: list[int] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def __call__(self, task: list[Text]) -> list[Tokens]:
        """Encode ``task`` and return one result for each stream that it has texts of."""
        found: dict[int, list[Tokens]] = {}
        for text in task:
            parts = found.setdefault(text.stream, [])
            parts.append(self._encode(text, named=any(part.unknown for part in parts)))
        return [_joined(stream, parts) for stream, parts in found.items()]

    def _encode(self, text: Text, named: bool) -> Tokens:
        whole = encode_whole(text.text, self.at_once)
        ids = without_joints(whole, text.text, self.at_once, text.head, text.tail)
        tokens = np.array(ids, dtype=np.uint32)
        unknown = self._unknown.count(text.text, tokens, text.head.chars)
        prompt = np.array(encode_whole(text.prompt, self.at_once) if text.prompt else [], dtype=np.uint32)
        unknown += self._unknown.count(text.prompt, prompt)
        first = self._unknown.first(text.text) if unknown and not named else ""
        begin = self.begin_tokens if not text.head.chars else ()  # later parts of a document overlap with the first
        end = (self.end_token,) if text.ends_document else ()
        tokens = np.concatenate(
            [np.array(part, dtype=np.uint32) for part in (begin, prompt | UNPREDICTED, tokens, end)]
        )
        return Tokens(text.stream, tokens, int(text.ends_document), unknown, first)


def _joined(stream: int, parts: list[Tokens]) -> Tokens:
    return Tokens(
        stream,
        np.concatenate([part.tokens for part in parts]),
        sum(part.documents for part in parts),
        sum(part.unknown for part in parts),
        next((part.first_unknown for part in parts if part.unknown), ""),
    )


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


def encode(texts: Iterable[Text], encoder: Encoder) -> Iterator[Tokens]:
    """Yield the tokens of ``texts`` in their order.

    Args:
        texts: Texts, read about ``TASK_CHARS`` characters ahead of what has been yielded.
        encoder: Encoder.
    """
    for task in tasks(texts):
        yield from encoder(task)


@lru_cache(maxsize=1)
def encoder_of(tokenizer_json: str, end_token: int, begin_tokens: tuple[int, ...] = ()) -> Encoder:
    """Keep the encoder between units: reading a large vocabulary takes seconds."""
    return Encoder(tokenizer_json, end_token, begin_tokens)
