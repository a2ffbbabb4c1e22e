"""One tar member of token rows: the header of a NumPy array, read without loading anything but numbers."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

HEADER_BYTES = 4096  # more than the header of any array of numbers
DTYPES = ("uint16", "uint32", "int32", "int64")


class RowsHeader(NamedTuple):
    """What a ``.npy`` member says of its rows.

    Attributes:
        begin: Offset of the first row in the member, in bytes.
        shape: (rows, sequence_length + 1); an array of one dimension is one row.
        dtype: Of the tokens.
        fortran_order: Whether columns lie together.
    """

    begin: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool

    @property
    def end(self) -> int:
        """Offset after the last row, in bytes."""
        return self.begin + int(np.prod(self.shape)) * self.dtype.itemsize


def read_header(content: memoryview) -> RowsHeader:
    """The header of a ``.npy`` member, from its first ``HEADER_BYTES``.

    Raises:
        ValueError: No such header. A pickled array has none that would be followed: only literals are parsed.
    """
    header = io.BytesIO(content)
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError("npy version is not 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
    shape = (1, *shape) if len(shape) == 1 else shape
    return RowsHeader(header.tell(), shape, dtype, fortran_order and min(shape, default=0) > 1)
