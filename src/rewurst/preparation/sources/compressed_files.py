"""Read the bytes or the text of a file, plain or compressed, in pieces of bounded size."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from ... import UsageError
from ...datamodules.storage.url import Place
from ...datamodules.storage.zstd_files import ZstdError, open_zstd

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 2**18
BLANK_LINE = "blank-line"
_VISIBLE = re.compile(rb"\S")
_BLANK_LINES = rb"\r?\n(?:[ \t]*\r?\n)+"


class DamagedFileError(UsageError):
    """A file that cannot be read to its end."""


def _raise(message: str) -> None:
    raise UsageError(message)


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
            elif compression in (".bz2", ".xz"):
                with (bz2.BZ2File if compression == ".bz2" else lzma.LZMAFile)(raw) as file:
                    yield cast(BinaryIO, file)
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile, ZstdError, lzma.LZMAError) as error:
        raise DamagedFileError(f"{path}: truncated or damaged {compression} file ({error})") from None
    except OSError as error:
        if error.errno is None and compression == ".bz2":  # bz2 has no error of its own
            raise DamagedFileError(f"{path}: truncated or damaged {compression} file ({error})") from None
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None


def text_pieces(path: Place, piece_chars: int) -> Iterator[str]:
    """Yield the text of a UTF-8 file, cut after the last line end within ``piece_chars`` characters, else there.

    Raises:
        UsageError: Invalid UTF-8 (with its byte offset in the decompressed file), or an error of ``open_bytes``.
    """
    buffer = ""
    for text in decoded(path):
        buffer += text
        while len(buffer) > piece_chars:
            cut = buffer.rfind("\n", 0, piece_chars) + 1 or piece_chars
            yield buffer[:cut]
            buffer = buffer[cut:]
    yield buffer


def lines(
    path: Place, maximum_bytes: int, bad: Callable[[str], None] = _raise, errors: str = "strict"
) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers from 1.

    Args:
        path: File.
        maximum_bytes: Length of the longest line.
        bad: Function that is told of a line that is too long or not UTF-8; if it returns, the line is skipped.
        errors: How bytes that are not UTF-8 are decoded, see ``bytes.decode``.

    Raises:
        UsageError: An error of ``open_bytes``, or one of ``bad``.
    """
    offset, number = 0, 0
    with open_bytes(path) as file:
        while line := file.readline(maximum_bytes + 1):
            number, begin = number + 1, offset
            offset += len(line)
            if len(line) > maximum_bytes:
                bad(f"{path}:{number}: line is longer than {maximum_bytes} bytes; cut the document")
                while line and not line.endswith(b"\n"):
                    line = file.readline(maximum_bytes)
                    offset += len(line)
                continue
            try:
                text = line.decode("utf-8", errors)
            except UnicodeDecodeError as error:
                bad(_not_utf8(path, begin + error.start, line[error.start]))
                continue
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def separated(path: Place, separator: str, maximum_bytes: int, bad: Callable[[str], None]) -> Iterator[str]:
    """Yield the documents of a UTF-8 file with a separator between them.

    Args:
        path: File.
        separator: Separator, or ``blank-line`` for one or more blank lines.
        maximum_bytes: Length of the longest document.
        bad: Function that is told of a document that is too long or not UTF-8; if it returns, it is skipped.

    Raises:
        UsageError: An error of ``open_bytes``, or one of ``bad``.
    """
    pattern = re.compile(_BLANK_LINES if separator == BLANK_LINE else re.escape(separator.encode()))
    for offset, content in _split(path, pattern, maximum_bytes):
        if len(content) > maximum_bytes:
            bad(f"{path}: the document at byte {offset} is longer than {maximum_bytes} bytes")
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            bad(_not_utf8(path, offset + error.start, content[error.start]))
            continue
        yield text.removeprefix("\ufeff") if offset == 0 else text


def _split(path: Place, pattern: re.Pattern[bytes], maximum_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the bytes of each document; one that is too long loses its end, but not its place."""
    content, offset, scanned, dropped = bytearray(), 0, 0, 0
    with open_bytes(path) as file:
        while block := file.read(BLOCK_BYTES):
            content += block
            begin = 0
            while (found := pattern.search(content, max(begin, scanned))) and _VISIBLE.search(content, found.end()):
                yield offset, bytes(content[begin : found.start()])
                offset += found.end() - begin + dropped
                begin, scanned, dropped = found.end(), 0, 0
            del content[:begin]
            # A separator may have begun in this block, and blank lines may continue in the next one.
            scanned = found.start() - begin if found else max(0, len(content) - 256)
            if len(content) > 2 * maximum_bytes:
                surplus = len(content) - maximum_bytes - BLOCK_BYTES
                del content[maximum_bytes + 1 : maximum_bytes + 1 + surplus]
                dropped, scanned = dropped + surplus, max(0, scanned - surplus)
    if found := pattern.search(content, scanned):
        yield offset, bytes(content[: found.start()])
        offset += found.end() + dropped
        del content[: found.end()]
    if content:
        yield offset, bytes(content)


def decoded(path: Place, errors: str = "strict") -> Iterator[str]:
    """Yield the text of a UTF-8 file in blocks.

    Args:
        path: File.
        errors: How bytes that are not UTF-8 are decoded, see ``bytes.decode``.

    Raises:
        UsageError: Invalid UTF-8, or an error of ``open_bytes``.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = 0
    with open_bytes(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = offset - pending + error.start
                raise DamagedFileError(_not_utf8(path, place, error.object[error.start])) from None
            yield text.removeprefix("\ufeff") if offset == 0 else text  # a byte order mark is not text
            offset += len(block)
            if not block:
                return


def _not_utf8(path: Place, offset: int, byte: int) -> str:
    return f"{path}: byte {offset} (0x{byte:02x}) is not valid UTF-8; convert the file or leave it out"
