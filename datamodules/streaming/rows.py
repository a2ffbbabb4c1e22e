"""Rows of tokens from the samples of a tar: arrays that are there, or text that is tokenized and packed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ..corpora.tokens import DTYPES, HEADER_BYTES, read_header
from .tars import TarSample

Pack = Callable[[Iterable[str]], Iterator[NDArray[Any]]]
"""Turns documents into the pieces of a stream of tokens."""


@dataclass(frozen=True)
class RowFormat:
    """Format of rows.

    Args:
        sequence_length: Number of predicted tokens per row.
        vocab_size: Every token is below it.
        text_field: Field of ``.json`` members with the text.
    """

    sequence_length: int
    vocab_size: int
    text_field: str


def rows_of(samples: Iterator[TarSample], url: str, form: RowFormat, pack: Pack) -> Iterator[NDArray[Any]]:
    """Yield the rows of a tar, each of shape (sequence_length + 1,).

    Args:
        samples: Samples of the tar.
        url: Tar, for messages.
        form: Length of the rows, and where text is.
        pack: What makes tokens of text.

    Raises:
        UsageError: A sample without tokens or text, rows of another length, or tokens outside the vocabulary.
    """
    first = next(samples, None)
    if first is None:
        return
    whole = itertools.chain([first], samples)
    if any(_is_array(name) for name in first):
        for sample in whole:
            yield from _array(sample, url, form)
    else:
        yield from _packed(pack(_text(sample, url, form.text_field) for sample in whole), form.sequence_length)


def _is_array(name: str) -> bool:
    return name.rpartition(".")[2] == "npy"


def _array(sample: TarSample, url: str, form: RowFormat) -> NDArray[Any]:
    place = f"{url}, sample {sample['__key__']!r}"
    names = [name for name in sample if _is_array(name)]
    if len(names) != 1:
        raise UsageError(f"{place}: {len(names)} members are .npy, expected one of token rows")
    content = sample[names[0]]
    try:
        header = read_header(memoryview(content)[:HEADER_BYTES])
    except ValueError as error:
        raise UsageError(f"{place}: no readable npy header ({str(error).splitlines()[0]})") from None
    shape, length = header.shape, form.sequence_length + 1
    fits = len(shape) == 2 and shape[1] == length and header.dtype.name in DTYPES and not header.fortran_order
    if not fits or header.end > len(content):
        raise UsageError(f"{place}: holds {header.dtype.name} of shape {shape}, expected token rows of {length}")
    rows = np.frombuffer(content, header.dtype, shape[0] * length, header.begin).reshape(shape)
    if rows.size and (rows.min() < 0 or rows.max() >= form.vocab_size):
        token = rows.min() if rows.min() < 0 else rows.max()
        raise UsageError(f"{place}: token {token} is outside the vocabulary of {form.vocab_size}")
    return rows


def _text(sample: TarSample, url: str, text_field: str) -> str:
    place = f"{url}, sample {sample['__key__']!r}"
    try:
        if "txt" in sample:
            return str(sample["txt"], "utf-8")
        if "json" not in sample:
            members = ", ".join(name for name in sample if not name.startswith("__"))
            raise UsageError(f"{place}: has {members}, expected .npy of token rows, .txt or .json")
        record = json.loads(sample["json"])
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{place}: not valid text ({error})") from None
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UsageError(f"{place}: no text in field {text_field!r}; text_field can be one of: {fields}")
    return text


def _packed(pieces: Iterator[NDArray[Any]], length: int) -> Iterator[NDArray[Any]]:
    """Yield rows that share a token with the one before; what is left at the end of a tar fills no row."""
    rest = np.empty(0, dtype=np.uint32)
    for piece in pieces:
        rest = np.concatenate([rest, piece])
        count = max(0, len(rest) - 1) // length
        for i in range(count):
            yield rest[i * length : (i + 1) * length + 1]
        rest = rest[count * length :]
