"""A corpus of tokens that is read from front to back: tars of token rows or of text that somebody else wrote.

1. Each reader (a worker of a process) has tars of its own, in an order that its seed and the pass decide.
2. Rows are shuffled within blocks of a tar, so that a place is a pass, a tar and a number of rows.
3. A micro-batch says after reading where its reader is; a resume opens the tar and skips what was taken from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ...tokenizer_files import TokenizerFiles
from ..corpora.tokens import TokenIndex, TokenShards
from ..sampling.micro_batches import UNKNOWN_ROWS
from .order import Place, ShardOrder
from .rows import Pack, RowFormat, rows_of
from .tars import is_pipe, samples

BUFFER_ROWS = 1024
PACKING = "rewurst.preparation.steps.packing", "token_stream"  # built on the data modules, so that it is found by name

Rows = NDArray[np.int64]


def expand_tars(sources: str | Sequence[str], allow_pipe: bool) -> list[str]:
    """Return the tars that a stream names; braces in paths and URLs are expanded.

    Raises:
        UsageError: A command that is not allowed, or no tar.
    """
    from braceexpand import braceexpand

    found: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        if is_pipe(source) and not allow_pipe:
            raise UsageError(f"{source}: runs a command; set allow_pipe: true if you trust its origin")
        if not is_pipe(source) and Path(source).is_dir():
            found += sorted(str(path) for path in Path(source).glob("*.tar*"))
        else:
            found += braceexpand(source)
    if not found:
        raise UsageError(f"stream {sources}: names no tar")
    return found


class TokenStream:
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

    streamed = True
    lanes = (UNKNOWN_ROWS,)

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
        self.name, self.path, self.urls, self._tokenizer = name, path, tuple(urls), tokenizer
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
        self._readers: dict[int, _Reader] = {}
        self._lane = 0

    def __len__(self) -> int:
        return UNKNOWN_ROWS

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def has_tokenizer_of(self, other: Any) -> bool:
        """Return whether another corpus has the same tokenizer."""
        return TokenShards.has_tokenizer_of(self, other)  # type: ignore[arg-type]

    def read_tokenizer(self) -> str:
        """Return the ``tokenizer.json``."""
        return self._tokenizer.json

    def in_lane(self, lane: int, index: Rows) -> Rows:
        """Return counters: rows have no numbers."""
        return index

    def fingerprint(self) -> str:
        """Return a hash of the tars' names and of what decides the rows."""
        parts = [list(self.urls), self._tokenizer.sha256, vars(self._form), BUFFER_ROWS]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def locate(self, row: int) -> str:
        """Return the place of a row, for messages."""
        return f"row {row} of a stream"

    def deal(self, process: int, order: ShardOrder, begin: int, places: Sequence[Place]) -> None:
        """Give this process its readers, one per worker.

        Args:
            process: Number of this process.
            order: Order of all tars.
            begin: Number of the first micro-batch.
            places: Place of each worker's reader.
        """
        self._process, self._order, self._begin, self._places = process, order, begin, list(places)
        self._readers = {}

    def seek(self, number: int) -> None:
        """Choose the reader of a micro-batch; those of a worker come in order.

        Raises:
            UsageError: A micro-batch came out of order, so that rows would be lost.
        """
        workers = len(self._places)
        lane = self._lane = number % workers
        reader = self._readers.get(lane)
        if reader is None:
            first = self._begin + (lane - self._begin) % workers
            index = self._process * workers + lane
            reader = self._readers[lane] = _Reader(self._order, index, self._places[lane], self._open, first)
        if number != reader.number:
            raise UsageError(f"corpus {self.name!r}: micro-batch {number} came where {reader.number} was due")
        reader.number += workers

    def place(self) -> tuple[int, int, int, int]:
        """Return the worker of the latest micro-batch, and where its reader is after it."""
        return (self._lane, *self._readers[self._lane].place)

    def read(self, rows: Rows) -> NDArray[Any]:
        """Return the next rows, (n, sequence_length + 1); only the number of ``rows`` matters."""
        tokens = np.empty((len(rows), self.index.sequence_length + 1), dtype=self.index.dtype)
        self.read_into(tokens, range(len(rows)), rows)
        return tokens

    def read_into(self, tokens: NDArray[Any], slots: Iterable[int], rows: Rows) -> None:
        """Read the next rows into these slots of ``tokens``."""
        reader = self._readers[self._lane]
        for slot in slots:
            tokens[slot] = reader.next()

    def _open(self, url: str, epoch: int) -> Iterator[NDArray[Any]]:
        return self._order.shuffled(rows_of(samples(url), url, self._form, self._pack), url, epoch, BUFFER_ROWS)

    @property
    def _pack(self) -> Pack:
        module, function = PACKING
        token_stream = getattr(import_module(module), function)

        def pack(texts: Iterable[str]) -> Iterator[NDArray[Any]]:
            found: Iterator[NDArray[Any]] = token_stream(texts, self._tokenizer)
            return found

        return pack


class _Reader:
    """One worker's rows, tar after tar, pass after pass."""

    def __init__(
        self,
        order: ShardOrder,
        index: int,
        place: Place,
        read: Callable[[str, int], Iterator[NDArray[Any]]],
        number: int,
    ) -> None:
        self.place, self.number = place, number
        self._order, self._index, self._read = order, index, read
        self._rows: Iterator[NDArray[Any]] | None = None
        self._taken = 1  # of this pass; a place within one says that there were rows

    def next(self) -> NDArray[Any]:
        """Return the next row."""
        while True:
            if self._rows is None:
                self._rows = self._next_tar()
            row = next(self._rows, None)
            if row is not None:
                self.place = self.place._replace(row=self.place.row + 1)
                self._taken += 1
                return row
            self.place, self._rows = Place(self.place.epoch, self.place.shard + 1, 0), None

    def _next_tar(self) -> Iterator[NDArray[Any]]:
        own = self._order.own(self._index, self.place.epoch)
        if self.place.shard >= len(own):
            if not self._taken:
                raise UsageError(f"corpus {self._order.corpus!r}: no row in {', '.join(own[:3])}")
            self.place, self._taken = Place(self.place.epoch + 1, 0, 0), 0
            own = self._order.own(self._index, self.place.epoch)
        return islice(self._read(own[self.place.shard], self.place.epoch), self.place.row, None)
