"""Rows of tokens in sequence, from tars of token rows or of text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...tokenizer_files import TokenizerFiles
from ..corpora.tokens import TokenIndex, TokenShards
from .rows import Pack, RowFormat, rows_of
from .stream import Rows, Stream
from .tars import samples

BUFFER_ROWS = 1024
PACKING = "rewurst.preparation.steps.packing", "token_stream"  # built on the data modules, so that it is found by name


class TokenStream(Stream[NDArray[Any]]):
    """Rows of tokens in sequence, for :class:`~rewurst.datamodules.TextDataModule`.

    Args:
        name: Name of the corpus.
        path: What the corpus was asked for as, for messages.
        urls: Tars.
        tokenizer: Tokenizer of the rows, or to make them with.
        sequence_length: Number of predicted tokens per row.
        text_field: Field of ``.json`` members with the text.
        folder: Folder for the tokenizer's copy.
    """

    def __init__(
        self,
        name: str,
        path: str,
        urls: Sequence[str],
        tokenizer: TokenizerFiles,
        sequence_length: int,
        text_field: str,
        folder: Path,
    ) -> None:
        super().__init__(name, path, urls)
        self._tokenizer = tokenizer
        self._form = RowFormat(sequence_length, tokenizer.vocab_size, text_field)
        self.index = TokenIndex(
            shards=(),
            rows=0,
            sources=self.urls,
            dtype="uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
            sequence_length=sequence_length,
            rows_per_sample=1,
            tokens=0,
            documents=0,
            dropped_tokens=0,
            vocab_size=tokenizer.vocab_size,
            end_token=tokenizer.end_token,
            tokenizer_sha256=tokenizer.sha256,
            begin_tokens=tokenizer.begin_tokens,
        )
        self.tokenizer_folder = str(folder / "tokenizers" / tokenizer.sha256[:16])
        if not Path(self.tokenizer_folder, "tokenizer.json").is_file():
            tokenizer.save(Path(self.tokenizer_folder))

    def has_tokenizer_of(self, other: Any) -> bool:
        """Return whether another corpus has the same tokenizer."""
        return TokenShards.has_tokenizer_of(self, other)  # type: ignore[arg-type]

    def read_tokenizer(self) -> str:
        """Return the ``tokenizer.json``."""
        return self._tokenizer.json

    def fingerprint(self) -> str:
        """Return a hash of the tars' names and of what decides the rows."""
        parts = [list(self.urls), self._tokenizer.sha256, vars(self._form), BUFFER_ROWS]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def read(self, rows: Rows) -> NDArray[Any]:
        """Return the next rows, (n, sequence_length + 1); only the number of ``rows`` matters."""
        tokens = np.empty((len(rows), self.index.sequence_length + 1), dtype=self.index.dtype)
        self.read_into(tokens, range(len(rows)), rows)
        return tokens

    def read_into(self, tokens: NDArray[Any], slots: Iterable[int], rows: Rows) -> None:
        """Read the next rows into these slots of ``tokens``."""
        for slot in slots:
            tokens[slot] = self.next()

    def open(self, url: str, epoch: int) -> Iterator[NDArray[Any]]:
        """Yield the rows of a tar in the order of a pass."""
        return self._order.shuffled(rows_of(samples(url), url, self._form, self._pack), url, epoch, BUFFER_ROWS)

    @property
    def _pack(self) -> Pack:
        module, function = PACKING
        token_stream = getattr(import_module(module), function)

        def pack(texts: Iterable[str]) -> Iterator[NDArray[Any]]:
            found: Iterator[NDArray[Any]] = token_stream(texts, self._tokenizer)
            return found

        return pack
