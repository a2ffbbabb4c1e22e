"""Bytes and text of one file, plain or compressed, in pieces of bounded size and with errors that say where."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ... import UsageError
from ...datamodules.storage.url import Place

COMPRESSIONS = (".gz", ".zst")
BLOCK_BYTES = 2**18
# A block of zstd holds up to 128 KiB and compresses to 4 bytes at best: this much input gives 32 MiB of output at most.
ZSTD_INPUT_BYTES = 2**10


@contextmanager
def open_bytes(path: Place) -> Iterator[BinaryIO]:
    """Open ``path`` decompressed by its suffix; what goes wrong inside the block is told in one line.

    Raises:
        UsageError: The file cannot be read, is truncated or is not what its suffix says.
    """
    compression = path.suffix.lower()
    try:
        with path.open("rb") as raw:
            if compression == ".gz":
                with gzip.GzipFile(fileobj=raw) as file:
                    yield io.BufferedReader(file, BLOCK_BYTES)
            elif compression == ".zst":
                yield io.BufferedReader(_ZstdStream(raw), BLOCK_BYTES)
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: truncated or damaged {compression} file ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None


def text_pieces(path: Place, piece_chars: int) -> Iterator[str]:
    """The text of a UTF-8 file, cut after the last line end within ``piece_chars`` characters, or there if none.

    Raises:
        UsageError: Invalid UTF-8, with its byte offset in the decompressed file, and what ``open_bytes`` raises.
    """
    buffer = ""
    for text in _decoded(path):
        buffer += text
        while len(buffer) > piece_chars:
            cut = buffer.rfind("\n", 0, piece_chars) + 1 or piece_chars
            yield buffer[:cut]
            buffer = buffer[cut:]
    yield buffer


def lines(path: Place, maximum_bytes: int) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1.

    Raises:
        UsageError: A line that is longer than ``maximum_bytes``, invalid UTF-8, and what ``open_bytes`` raises.
    """
    offset, number = 0, 0
    with open_bytes(path) as file:
        while line := file.readline(maximum_bytes + 1):
            number += 1
            if len(line) > maximum_bytes:
                raise UsageError(f"{path}:{number}: line is longer than {maximum_bytes} bytes; cut the document")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start, line[error.start]) from None
            yield number, text.removeprefix("\ufeff") if number == 1 else text
            offset += len(line)


def _decoded(path: Place) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_bytes(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - pending + error.start, error.object[error.start]) from None
            yield text.removeprefix("\ufeff") if offset == 0 else text  # a byte order mark is no text
            offset += len(block)
            if not block:
                return


def _not_utf8(path: Place, offset: int, byte: int) -> UsageError:
    return UsageError(f"{path}: byte {offset} (0x{byte:02x}) is not valid UTF-8; convert the file or leave it out")


class _ZstdStream(io.RawIOBase):
    """Frames of zstd one after the other; unlike zstandard's own reader it notices a truncated last one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._new_frame, self._error = raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame = self._new_frame()
        self._fed = False  # has the present frame been given a byte
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._output and self._refill():
            pass
        count = min(len(target), len(self._output))
        target[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _refill(self) -> bool:
        data = self._input or self._raw.read(ZSTD_INPUT_BYTES)
        self._input = b""
        if not data:
            if self._fed and not self._frame.eof:
                raise EOFError("it ends within a frame")
            return False
        if self._frame.eof:
            self._frame = self._new_frame()
        self._fed = True
        try:
            self._output = memoryview(self._frame.decompress(data))
        except self._error as error:
            raise EOFError(str(error)) from None
        if self._frame.eof:
            self._input = self._frame.unused_data
        return True
