"""Read text sources (files, folders, built-in corpora) as documents, in a fixed order and in bounded memory.

1. ``expand`` turns SOURCE strings into an ordered list of ``SourceFile``. Files of unknown kinds are counted.
2. ``read`` turns a file into ``Piece``s. A long document comes in several; the last one ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ... import UsageError
from ...datamodules.corpora.tar import scan
from ...datamodules.imaging.captions import text_of
from ...datamodules.imaging.header import DecodeError
from ...datamodules.storage.random_access import open_bytes
from ...datamodules.storage.url import Place, place
from . import builtin_text as builtin
from . import records, tables
from .compressed_files import DamagedFileError, separated, text_pieces
from .skipped import Skipped
from .source_files import PLAIN_TEXT, SourceFile, expand, identity, walk

__all__ = ["Piece", "Skipped", "SourceFile", "expand", "identity", "read", "walk"]

PIECE_CHARS = 2**16
TSV, CSV = "\t", ","


@dataclass(frozen=True)
class Piece:
    """Up to 64 Ki characters of a document.

    Attributes:
        text: Characters.
        ends_document: Whether they are the document's last ones.
        corrupt: Whether the document cannot be read further and is to be left out.
        prompt: Beginning of the document that is not to be predicted, in its first piece.
    """

    text: str
    ends_document: bool
    corrupt: bool = False
    prompt: str = ""


def read(
    file: SourceFile,
    text_field: str,
    skipped: Skipped,
    separator: str | None = None,
    prompt_field: str | None = None,
) -> Iterator[Piece]:
    """Yield the documents of ``file`` in pieces; empty ones (or only white space) are counted in ``skipped``.

    Args:
        file: File or built-in corpus, from ``expand``.
        text_field: Field of JSON objects or column of tables that has the text.
        skipped: Counter of skipped, repaired and corrupt documents.
        separator: What separates the documents of a .txt or .md file: ``blank-line`` or any text (default: the whole
            file is one document).
        prompt_field: Field of JSON objects with the beginning of the document that is not to be predicted.

    Raises:
        UsageError: The file cannot be read; the message gives the line, the byte offset or the available fields.
    """
    complete = True
    try:
        if file.kind in PLAIN_TEXT and separator is None:
            for piece in _whole_file(place(file.name), skipped):
                complete = piece.ends_document
                yield piece
            return
        for document in _documents(file, text_field, skipped, separator, prompt_field):
            skipped.documents += 1
            if not document or document.isspace():
                skipped.empty_documents += 1
            else:
                prompt = getattr(document, "prompt", "")
                yield from _cut(_valid(document, skipped), _valid(prompt, skipped))
    except DamagedFileError as error:
        skipped.damaged(str(error), identity(file)[1])
        if not complete:
            yield Piece("", ends_document=True, corrupt=True)


def _documents(
    file: SourceFile, text_field: str, skipped: Skipped, separator: str | None, prompt_field: str | None
) -> Iterator[str]:
    if prompt_field is not None and file.kind not in (".jsonl", ".json"):
        raise UsageError(f"{file.name}: only .jsonl and .json files can have a prompt_field")
    match file.kind:
        case ".jsonl":
            return records.json_lines(place(file.name), text_field, skipped, prompt_field)
        case ".json":
            return records.json_file(place(file.name), text_field, skipped, prompt_field)
        case ".csv" | ".tsv":
            return records.csv_rows(place(file.name), text_field, skipped, TSV if file.kind == ".tsv" else CSV)
        case ".parquet":
            return tables.parquet(place(file.name), text_field, skipped)
        case ".arrow":
            return tables.arrow(place(file.name), text_field, skipped)
        case ".tar":
            return _captions(file.name, skipped)
        case "builtin":
            return builtin.documents(file.name)
    assert separator is not None
    return separated(place(file.name), separator, records.LINE_BYTES, skipped.corrupt)


def _captions(path: str, skipped: Skipped) -> Iterator[str]:
    """Yield the ``.txt`` files of a WebDataset tar, which are the captions of its images."""
    content, left_out = open_bytes(path), list[str]()
    samples = scan(content, path, left_out)
    while True:
        try:
            sample = next(samples, None)
        except UsageError as error:
            raise DamagedFileError(str(error)) from None
        if sample is None:
            skipped.left_out_members += len(left_out)
            return
        for member in sample.members:
            if member.extension.rpartition(".")[2] == "txt":  # names may have other dots
                try:
                    yield text_of(bytes(content.read(member.begin, member.begin + member.size)))
                except DecodeError as error:
                    skipped.corrupt(f"{path}: {sample.key}.{member.extension}: {error}")


def _whole_file(path: Place, skipped: Skipped) -> Iterator[Piece]:
    """Yield a file as one document; reading one piece ahead tells which piece is the last."""
    pieces = text_pieces(path, PIECE_CHARS)
    present = next(pieces)
    following = next(pieces, None)
    skipped.documents += 1
    if following is None and not present.strip():
        skipped.empty_documents += 1
        return
    while following is not None:
        yield Piece(present, ends_document=False)
        present, following = following, next(pieces, None)
    yield Piece(present, ends_document=True)


def _valid(document: str, skipped: Skipped) -> str:
    """Replace half surrogate pairs, which JSON can spell but no encoding of Unicode, so no tokenizer, can represent."""
    try:
        document.encode("utf-8")
    except UnicodeEncodeError:
        skipped.repaired_documents += 1
        return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return document


def _cut(document: str, prompt: str = "") -> Iterator[Piece]:
    position = 0
    while len(document) - position > PIECE_CHARS:
        end = document.rfind("\n", position, position + PIECE_CHARS) + 1 or position + PIECE_CHARS
        yield Piece(document[position:end], ends_document=False, prompt="" if position else prompt)
        position = end
    yield Piece(document[position:], ends_document=True, prompt="" if position else prompt)
