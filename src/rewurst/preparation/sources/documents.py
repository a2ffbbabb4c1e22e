"""Read text sources (files, folders, built-in corpora) as documents, in a fixed order and in bounded memory.

1. ``expand`` turns SOURCE strings into an ordered list of ``SourceFile``. Files of unknown kinds are counted.
2. ``read`` turns a file into ``Piece``s. A long document comes in several; the last one ends it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import UsageError
from ...datamodules.corpora.tar import scan
from ...datamodules.imaging.captions import text_of
from ...datamodules.imaging.header import DecodeError
from ...datamodules.storage.random_access import is_remote, open_bytes
from ...datamodules.storage.url import Place, Url, find, place, seekable
from ...hints import did_you_mean
from . import builtin_text as builtin
from .compressed_files import COMPRESSIONS, lines, text_pieces

PIECE_CHARS = 2**16  # an encoding takes about 150 bytes per token, and a character can be four tokens
LINE_BYTES = 2**25  # a line of JSON is parsed whole, and takes up to eight times its size while it is
PARQUET_BATCH_ROWS = 64
_PLAIN_KINDS = (".txt", ".md", ".jsonl")
KINDS = (*_PLAIN_KINDS, ".parquet", ".tar")


@dataclass(frozen=True)
class Piece:
    """Up to 64 Ki characters of a document, and whether they are its last ones."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class SourceFile:
    """A file or a built-in corpus; ``kind`` is its suffix without compression, or ``builtin``."""

    name: str
    kind: str


@dataclass
class Skipped:
    """Counts of what was skipped or repaired while sources were read."""

    unknown_files: list[str] = field(default_factory=list)
    empty_documents: int = 0
    repaired_documents: int = 0
    left_out_members: int = 0

    def report(self) -> str:
        """Return one line for the summary, empty if nothing was skipped."""
        parts = []
        if self.unknown_files:
            first = self.unknown_files[0]
            parts.append(
                f"{len(self.unknown_files)} files of unknown kind, or links to folders, skipped (the first: {first})"
            )
        if self.left_out_members:
            parts.append(f"{self.left_out_members} files of tars that belong to no sample skipped")
        if self.empty_documents:
            parts.append(f"{self.empty_documents} empty documents skipped")
        if self.repaired_documents:
            parts.append(f"{self.repaired_documents} documents with half a surrogate pair, replaced by U+FFFD")
        return "; ".join(parts)


def expand(sources: Sequence[str], skipped: Skipped) -> list[SourceFile]:
    """List the files behind ``sources``, in the order given; files of a folder are sorted by path.

    Raises:
        UsageError: No sources, a path that does not exist, a file of unknown kind, a folder without a readable file.
    """
    if not sources:
        raise UsageError(f"no sources given, expected {_expected()}")
    files: list[SourceFile] = []
    for source in sources:
        path = Path(source)
        if source.startswith(builtin.PREFIX):
            builtin.documents(source)  # refuses a misspelled name now, not after the files before it
            files.append(SourceFile(source, "builtin"))
        elif is_remote(source):
            files += _expand_url(Url(source), skipped)
        elif path.is_dir():
            files += _expand_folder(path, skipped)
        elif not path.exists():
            raise UsageError(f"source {source}: no such file or folder{did_you_mean(path)}")
        elif (kind := _kind(path)) is None:
            raise UsageError(f"source {source}: unknown kind {path.suffix or path.name!r}, expected {_expected()}")
        else:
            files.append(SourceFile(source, kind))
    return files


def read(file: SourceFile, text_field: str, skipped: Skipped) -> Iterator[Piece]:
    """Yield the documents of ``file`` in pieces; empty ones (or only white space) are counted in ``skipped``.

    Args:
        file: File or built-in corpus, from ``expand``.
        text_field: Field of JSON lines or column of Parquet files that has the text.
        skipped: Counter of skipped and repaired documents.

    Raises:
        UsageError: The file cannot be read; the message gives the line, the byte offset or the available fields.
    """
    if file.kind in (".txt", ".md"):
        yield from _whole_file(place(file.name), skipped)
        return
    match file.kind:
        case ".jsonl":
            documents = _json_lines(place(file.name), text_field)
        case ".parquet":
            documents = _parquet(place(file.name), text_field)
        case ".tar":
            documents = _captions(file.name, skipped)
        case _:
            documents = builtin.documents(file.name)
    for document in documents:
        if not document or document.isspace():
            skipped.empty_documents += 1
        else:
            yield from _cut(_valid(document, skipped))


def _captions(path: str, skipped: Skipped) -> Iterator[str]:
    """Yield the ``.txt`` files of a WebDataset tar, which are the captions of its images.

    Raises:
        UsageError: One is not text, or the tar cannot be read.
    """
    content, left_out = open_bytes(path), list[str]()
    for sample in scan(content, path, left_out):
        for member in sample.members:
            if member.extension == "txt":
                try:
                    yield text_of(bytes(content.read(member.begin, member.begin + member.size)))
                except DecodeError as error:
                    raise UsageError(f"{path}: {sample.key}.txt: {error}") from None
    skipped.left_out_members += len(left_out)


def identity(file: SourceFile) -> tuple[str, int, str]:
    """Return the name, the size in bytes, and a tag that changes when the file does (only the name if built in).

    Raises:
        UsageError: There is no such file.
    """
    if file.kind == "builtin":
        return file.name, 0, ""
    where = place(file.name)
    try:
        if isinstance(where, Url):
            return file.name, *where.describe()
        status = where.stat()
    except OSError as error:
        raise UsageError(f"source {where}: cannot be read ({error.strerror or error})") from None
    return file.name, status.st_size, str(status.st_mtime_ns)


def _kind(path: Place) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return suffixes[0] if suffixes[0] in _PLAIN_KINDS else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def _expected() -> str:
    built_in = f"{builtin.PREFIX}prose or {builtin.PREFIX}code"
    return (
        f"{', '.join(_PLAIN_KINDS)} (or these with {' or '.join(COMPRESSIONS)}), .parquet, .tar, a folder, {built_in}"
    )


def _expand_folder(folder: Path, skipped: Skipped) -> list[SourceFile]:
    found: list[SourceFile] = []
    for path in sorted(walk(folder), key=lambda path: path.relative_to(folder).parts):
        kind = None if path.is_dir() else _kind(path)
        if kind is None:
            skipped.unknown_files.append(str(path))
        else:
            found.append(SourceFile(str(path), kind))
    if not found:
        raise UsageError(f"source {folder}: the folder has no file of a known kind, expected {_expected()}")
    return found


def _expand_url(url: Url, skipped: Skipped) -> list[SourceFile]:
    """List the object at a URL if its kind is known, else all objects below it."""
    if (kind := _kind(url)) is not None:
        identity(SourceFile(url.url, kind))
        return [SourceFile(url.url, kind)]
    found = []
    for below in find(url.url):
        kind = _kind(below)
        if kind is None:
            skipped.unknown_files.append(str(below))
        else:
            found.append(SourceFile(below.url, kind))
    if not found:
        raise UsageError(f"source {url}: no such folder, or none with a file of a known kind, expected {_expected()}")
    return found


def walk(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders, and links to folders.

    Raises:
        UsageError: A folder in it cannot be read.
    """
    for inside, folders, names in os.walk(folder, onerror=_cannot_list):
        # Links to folders are not followed, because they can form a loop: they count as unknown files.
        links = [name for name in folders if Path(inside, name).is_symlink()]
        yield from (Path(inside, name) for name in [*names, *links])


def _cannot_list(error: OSError) -> None:
    raise UsageError(f"source {error.filename}: the folder cannot be read ({error.strerror})")


def _whole_file(path: Place, skipped: Skipped) -> Iterator[Piece]:
    """Yield a file as one document; reading one piece ahead tells which piece is the last."""
    pieces = text_pieces(path, PIECE_CHARS)
    present = next(pieces)
    following = next(pieces, None)
    if following is None and not present.strip():
        skipped.empty_documents += 1
        return
    while following is not None:
        yield Piece(present, ends_document=False)
        present, following = following, next(pieces, None)
    yield Piece(present, ends_document=True)


def _json_lines(path: Place, text_field: str) -> Iterator[str]:
    for number, line in lines(path, LINE_BYTES):
        if line.isspace():
            yield ""
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(fields, dict):
            raise UsageError(f"{path}:{number}: a line holds {_type(fields)}, expected an object")
        if text_field not in fields:
            keys = ", ".join(fields) or "none"
            raise UsageError(f"{path}:{number}: no field {text_field!r}; --text_field can be one of: {keys}")
        yield _text(fields[text_field], f"{path}:{number}: field {text_field!r}")


def _parquet(path: Place, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered, because otherwise a whole column chunk is read, which can be gigabytes.
        with pq.ParquetFile(seekable(path), buffer_size=2**20, pre_buffer=False) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UsageError(f"{path}: no column {column!r}; --text_field can be one of: {names}")
            row = 0
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[column], use_threads=False):
                for value in batch.column(0):
                    yield _text(value.as_py(), f"{path}, row {row}: column {column!r}")
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _text(value: Any, where: str) -> str:
    """Return a text; null is an empty document, any other type means the wrong field."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{where} holds {_type(value)}, expected text")
    return value


def _type(value: Any) -> str:
    return {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _valid(document: str, skipped: Skipped) -> str:
    """Replace half surrogate pairs, which JSON can spell but no encoding of Unicode, so no tokenizer, can represent."""
    try:
        document.encode("utf-8")
    except UnicodeEncodeError:
        skipped.repaired_documents += 1
        return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return document


def _cut(document: str) -> Iterator[Piece]:
    position = 0
    while len(document) - position > PIECE_CHARS:
        end = document.rfind("\n", position, position + PIECE_CHARS) + 1 or position + PIECE_CHARS
        yield Piece(document[position:end], ends_document=False)
        position = end
    yield Piece(document[position:], ends_document=True)
