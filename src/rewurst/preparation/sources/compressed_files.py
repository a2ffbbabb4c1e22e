"""Read the bytes or the text of a file, plain or compressed, in pieces of bounded size."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from ... import UsageError
from ...datamodules.storage.url import Place
from ...datamodules.storage.zstd_files import ZstdError, open_zstd

COMPRESSIONS = (".gz", ".zst")
BLOCK_BYTES = 2**18


@contextmanager
def open_bytes(path: Place) -> Iterator[BinaryIO]:
    """Open ``path``, decompressed by its suffix; errors inside the block become one line.

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
                with open_zstd(raw) as file:
                    yield cast(BinaryIO, file)
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile, ZstdError) as error:
        raise UsageError(f"{path}: truncated or damaged {compression} file ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None


def text_pieces(path: Place, piece_chars: int) -> Iterator[str]:
    """Yield the text of a UTF-8 file, cut after the last line end within ``piece_chars`` characters, else there.

    Raises:
        UsageError: Invalid UTF-8 (with its byte offset in the decompressed file), or an error of ``open_bytes``.
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
    """Yield the lines of a UTF-8 file with their numbers from 1.

    Raises:
        UsageError: A line is longer than ``maximum_bytes`` or not UTF-8, or an error of ``open_bytes``.
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
            yield text.removeprefix("\ufeff") if offset == 0 else text  # a byte order mark is not text
            offset += len(block)
            if not block:
                return


def _not_utf8(path: Place, offset: int, byte: int) -> UsageError:
    return UsageError(f"{path}: byte {offset} (0x{byte:02x}) is not valid UTF-8; convert the file or leave it out")
