"""Read flat token files in place: Megatron's and GPT-NeoX's ``.bin``, nanoGPT's, llm.c's and LitData's chunks.

Each file is a stream of tokens after a header of any length. Row i begins at token i times ``sequence_length`` and has
one token more, as in rewurst's shards, so that every token of a file except the first is predicted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ..storage.random_access import open_bytes
from .index import Shard
from .open_shards import shard_path
from .tokens import TokenIndex


@dataclass(frozen=True, kw_only=True)
class FlatIndex(TokenIndex):
    """The contents of ``index.json`` of flat files; both ``rows`` and ``samples`` of a shard count rows.

    Attributes:
        begins: Offset of the first token of each file, in bytes.
    """

    begins: tuple[int, ...]
    kind: str = "flat"
    shard_names: ClassVar[str] = r"[^/\\\0]+"

    def check(self, where: str) -> None:
        """Raise ``UsageError`` if the index at ``where`` contradicts itself."""
        super().check(where)
        if len(self.begins) != len(self.shards):
            raise UsageError(
                f"{where}: begins has {len(self.begins)} offsets for {len(self.shards)} files; index them again"
            )


class FlatFile:
    """One flat file of tokens.

    Args:
        index: Index of the corpus.
        folder: Path or URL of the folder that contains the index.
        shard: Entry of the file in the index.

    Raises:
        UsageError: The file is missing or has another size.
    """

    def __init__(self, index: FlatIndex, folder: str, shard: Shard) -> None:
        self.shard = shard
        self.where = shard_path(folder, shard)
        self.content = open_bytes(self.where, shard.bytes)
        self._begin = index.begins[index.shards.index(shard)]
        self._length, self._dtype = index.sequence_length, np.dtype(index.dtype).newbyteorder("<")

    def row(self, number: int) -> NDArray[Any]:
        """Return the tokens of a row of the file, shape (sequence_length + 1,)."""
        begin = self._begin + number * self._length * self._dtype.itemsize
        content = self.content.read(begin, begin + (self._length + 1) * self._dtype.itemsize)
        return np.frombuffer(content, dtype=self._dtype)

    def place(self, number: int) -> str:
        """Return the place of a row of the file, for messages."""
        return f"row {number}, from token {number * self._length} on"
