"""Read the records of JSON and CSV files, one text each; a record that cannot be used is counted and skipped."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from typing import Any

from ... import UsageError
from ...datamodules.storage.url import Place
from .compressed_files import DamagedFileError, decoded, lines
from .skipped import Skipped

LINE_BYTES = 2**25  # a line of JSON is parsed whole, and takes up to eight times its size while it is
BLANK = " \t\r\n"
ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that were not UTF-8


class Prompted(str):
    """The text of a document that continues a prompt, which is not to be predicted."""

    prompt: str

    @classmethod
    def of(cls, text: str, prompt: str) -> Prompted:
        """Return a text with its prompt."""
        prompted = cls(text)
        prompted.prompt = prompt
        return prompted


def json_lines(path: Place, text_field: str, skipped: Skipped, prompt_field: str | None = None) -> Iterator[str]:
    """Yield the text of each line, which is a JSON object."""
    for number, line in lines(path, LINE_BYTES, skipped.corrupt):
        if line.isspace():
            yield ""
            continue
        try:
            record = json.loads(line)
            text = field_text(record, text_field, f"{path}:{number}", "a line")
            if prompt_field is not None:
                text = Prompted.of(text, field_text(record, prompt_field, f"{path}:{number}", "a line"))
        except UsageError as error:
            skipped.corrupt(str(error))
        except (ValueError, RecursionError) as error:
            skipped.corrupt(f"{path}:{number}: not valid JSON ({error})")
        else:
            yield text


def json_file(path: Place, text_field: str, skipped: Skipped, prompt_field: str | None = None) -> Iterator[str]:
    """Yield the texts of a .json file: a list of objects, one object, or one object per line."""
    if _is_list(path):
        return _texts(_elements(path), path, text_field, skipped, prompt_field)
    if _has_a_value_per_line(path):
        return json_lines(path, text_field, skipped, prompt_field)
    return _texts(_values(path), path, text_field, skipped, prompt_field)


def csv_rows(path: Place, column: str, skipped: Skipped, delimiter: str) -> Iterator[str]:
    """Yield the column of each row; the first row names the columns.

    Raises:
        UsageError: There is no such column.
    """
    csv.field_size_limit(LINE_BYTES)
    # A stray quote would swallow all rows up to the next one, so the quotes have to be right.
    # Bytes that are not UTF-8 are found in the row, because a row may have several lines.
    read = (line for _, line in lines(path, LINE_BYTES, skipped.corrupt, "surrogateescape"))
    rows = csv.reader(read, delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise DamagedFileError(f"{path}: the row of column names cannot be read ({error})") from None
    if column not in header:
        names = ", ".join(header) or "none"
        raise UsageError(f"{path}: no column {column!r}; --text_field can be one of: {names}")
    place = header.index(column)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            skipped.corrupt(f"{path}:{rows.line_num}: not a row of CSV ({error})")
            continue
        if row and len(row) != len(header):
            skipped.corrupt(f"{path}:{rows.line_num}: {len(row)} values, the first row names {len(header)} columns")
        elif bad := not_utf8(row[place] if row else ""):
            skipped.corrupt(f"{path}:{rows.line_num}: column {column!r}: {bad}")
        else:
            yield row[place] if row else ""


def field_text(record: Any, field: str, where: str, what: str) -> str:
    """Return the text in a field of a JSON object; ``raw.text`` is the field ``text`` of the object ``raw``.

    Raises:
        UsageError: It has none.
    """
    if not isinstance(record, dict):
        raise UsageError(f"{where}: {what} holds {type_name(record)}, expected an object")
    inside: Any = record
    for name in [field] if field in record else field.split("."):
        if not isinstance(inside, dict) or name not in inside:
            keys = ", ".join(paths_of(record)) or "none"
            raise UsageError(f"{where}: no field {field!r}; --text_field can be one of: {keys}")
        inside = inside[name]
    if isinstance(inside, dict) and inside:
        keys = ", ".join(paths_of(inside, f"{field}."))
        raise UsageError(f"{where}: field {field!r} holds an object; --text_field can be one of: {keys}")
    return text_of(inside, f"{where}: field {field!r}")


def paths_of(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the names of an object's fields, those of inner objects as paths."""
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from paths_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def text_of(value: Any, where: str) -> str:
    """Return a text; null is an empty document, bytes are UTF-8, and any other type means the wrong field.

    Raises:
        UsageError: The value is not a text.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{where}: byte {error.start} (0x{value[error.start]:02x}) is not valid UTF-8") from None
    if not isinstance(value, str):
        raise UsageError(f"{where} holds {type_name(value)}, expected text")
    return value


def not_utf8(text: str) -> str:
    """Return what is wrong with a text that was decoded with ``surrogateescape``, empty if nothing is."""
    bad = None if text.isascii() else ESCAPED.search(text)
    return f"byte 0x{ord(bad.group()) - 0xDC00:02x} is not valid UTF-8" if bad else ""


def type_name(value: Any) -> str:
    """Return what a value of JSON is, for messages."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a text"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _is_list(path: Place) -> bool:
    """Return whether the first character of a file that is not blank begins a list."""
    for piece in decoded(path, "surrogateescape"):
        if begins := piece.lstrip(BLANK):
            return begins[0] == "["
    return False


def _has_a_value_per_line(path: Place) -> bool:
    """Return whether the first two lines of a file look like an object each; the first may be damaged."""
    first = ""
    for _, line in lines(path, LINE_BYTES, lambda message: None):
        if not line.isspace():
            if first:
                return line.lstrip().startswith("{")
            first = line.strip()
            if first != "{" and _is_json(first):
                return True
    return first != "{"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _texts(
    values: Iterator[Any], path: Place, text_field: str, skipped: Skipped, prompt_field: str | None
) -> Iterator[str]:
    for number, value in enumerate(values):
        where = f"{path}, element {number}"
        try:
            text = field_text(value, text_field, where, "an element")
            prompt = "" if prompt_field is None else field_text(value, prompt_field, where, "an element")
        except UsageError as error:
            skipped.corrupt(str(error))
            continue
        if bad := not_utf8(text + prompt):
            skipped.corrupt(f"{where}: field {text_field!r}: {bad}")
        else:
            yield Prompted.of(text, prompt) if prompt else text


def _elements(path: Place) -> Iterator[Any]:
    """Yield the elements of a list, one at a time."""
    values = _Values(path)
    values.skip("[")
    number = 0
    while values.character() != "]":
        if number:
            values.skip(",")
        yield values.next(f"element {number}")
        number += 1


def _values(path: Place) -> Iterator[Any]:
    """Yield JSON values that follow each other."""
    values = _Values(path)
    number = 0
    while values.character():
        yield values.next(f"element {number}")
        number += 1


class _Values:
    """Parses a file value by value, in memory for one."""

    def __init__(self, path: Place) -> None:
        self._path, self._pieces, self._text = path, decoded(path, "surrogateescape"), ""
        self._decoder = json.JSONDecoder()

    def character(self) -> str:
        """Return the next character that is not blank, empty at the end of the file."""
        while not (text := self._text.lstrip(BLANK)):
            if not self._more():
                return ""
        self._text = text
        return text[0]

    def skip(self, character: str) -> None:
        found = self.character()
        if found != character:
            raise DamagedFileError(f"{self._path}: not valid JSON (expected {character!r}, found {found!r})")
        self._text = self._text[1:]

    def next(self, what: str) -> Any:
        self.character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text)
            except (ValueError, RecursionError) as error:
                reason: Exception = error
            else:
                if end < len(self._text) or not self._more():  # a number may continue
                    self._text = self._text[end:]
                    return value
                continue
            if len(self._text) > LINE_BYTES or not self._more(len(self._text)):
                raise DamagedFileError(f"{self._path}, {what}: not valid JSON ({reason})")

    def _more(self, characters: int = 1) -> bool:
        """Read on; a value is parsed again when its text has doubled."""
        parts, size = [self._text], 0
        for piece in self._pieces:
            parts.append(piece)
            size += len(piece)
            if size >= characters:
                break
        self._text = "".join(parts)
        return size > 0
