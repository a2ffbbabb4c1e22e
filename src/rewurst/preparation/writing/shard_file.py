"""Write one WebDataset tar and its sidecar of offsets."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from ...datamodules.corpora.index import Shard
from ...files import writing


class ShardFile:
    """A tar that is hashed while it is written; its bytes do not depend on who writes it or when.

    Args:
        path: Path of the tar; its sidecar has the same name with the suffix ``.idx``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self._rows = 0
        self._offsets: list[int] = []
        self._file = _HashingFile(path)
        # The bytes of webdataset's TarWriter with mtime 0, without its import of torch, which takes 0.5 GB.
        self._tar = tarfile.open(fileobj=cast(Any, self._file), mode="w|", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete what has been written if the block failed."""
        if kind is not None:
            self.discard()

    def add(self, key: str, rows: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> None:
        """Append the member ``<key>.npy`` with ``rows``, shape (n, sequence_length + 1), and ``<key>.mask.npy``."""
        members = {}
        for suffix, array in (("npy", rows), ("mask.npy", mask)):
            if array is not None:
                content = io.BytesIO()
                np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
                members[suffix] = content.getbuffer()
        self.add_members(key, members, len(rows))

    def add_members(self, key: str, members: Mapping[str, bytes | memoryview], rows: int = 1) -> None:
        """Append a sample: a member ``<key>.<suffix>`` for each suffix, in their order.

        Args:
            key: Key without a dot, different from the previous sample's; webdataset splits names at the first dot.
            members: Contents by suffix.
            rows: Number of rows that the sample counts for.
        """
        self._offsets.append(self._tar.offset)
        for suffix, content in members.items():
            header = tarfile.TarInfo(f"{key}.{suffix}")  # mtime 0, mode 0644, no user, no group
            header.size = len(content)
            self._tar.addfile(header, io.BytesIO(content))
        self._rows += rows
        self.samples += 1

    @property
    def bytes(self) -> int:
        """Return the number of bytes written so far."""
        return self._tar.offset

    def close(self) -> Shard:
        """Finish the tar and write its sidecar; both are on disk afterwards."""
        end = self._tar.offset
        self._tar.close()
        size, sha256 = self._file.close()
        sidecar = self.path.with_suffix(".idx")
        with writing(sidecar), sidecar.open("wb") as file:
            file.write(np.array([*self._offsets, end], dtype="<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        return Shard(self.path.name, size, self.samples, self._rows, sha256)

    def discard(self) -> None:
        """Delete what has been written."""
        self._file.discard()
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".idx").unlink(missing_ok=True)


class _HashingFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        with writing(path):
            self._file = path.open("wb")

    def write(self, data: bytes) -> int:
        if self._file.closed:  # discarded; tarfile still wants to flush when it is collected
            return 0
        self._hash.update(data)
        with writing(self._path):
            return self._file.write(data)

    def close(self) -> tuple[int, str]:
        """Flush the file to disk and return its size in bytes and its SHA-256."""
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.close()
        return size, self._hash.hexdigest()

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
            self._file.close()
