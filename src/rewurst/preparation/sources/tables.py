"""Read a column of Parquet and Arrow files, one text per row; a row that cannot be used is counted and skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ... import UsageError
from ...datamodules.storage.url import Place, seekable
from .compressed_files import DamagedFileError
from .records import text_of
from .skipped import Skipped

PARQUET_BATCH_ROWS = 64


def parquet(path: Place, column: str, skipped: Skipped) -> Iterator[str]:
    """Yield the column of each row; ``raw.text`` is the field ``text`` of the column ``raw``.

    Raises:
        UsageError: There is no such column, or it does not have text; the file is not readable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered, because otherwise a whole column chunk is read, which can be gigabytes.
        with pq.ParquetFile(seekable(path), buffer_size=2**20, pre_buffer=False) as file:
            names = _path_of(file.schema_arrow, column, path)
            batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=[".".join(names)], use_threads=False)
            yield from _texts(batches, names, path, column, skipped)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{path}: not a readable Parquet file ({_line(error)})") from None


def arrow(path: Place, column: str, skipped: Skipped) -> Iterator[str]:
    """Yield the column of each row of an Arrow file or stream, such as `datasets.save_to_disk` writes.

    Raises:
        UsageError: There is no such column, or it does not have text; the file is not readable.
    """
    import pyarrow as pa

    try:
        with path.open("rb") as raw, pa.PythonFile(raw, "r") as file:
            magic = raw.read(6)
            raw.seek(0)
            with (pa.ipc.open_file if magic == b"ARROW1" else pa.ipc.open_stream)(file) as reader:
                names = _path_of(reader.schema, column, path)
                yield from _texts(_batches(reader), names, path, column, skipped)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{path}: not a readable Arrow file ({_line(error)})") from None


def _batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from reader


def _path_of(schema: Any, column: str, path: Place) -> list[str]:
    """Return the names that lead to a column.

    Raises:
        UsageError: There is none, or it does not have text.
    """
    for names in ([column], column.split(".")):
        fields, kind = {field.name: field.type for field in schema}, None
        for name in names:
            kind = fields.get(name)
            fields = _inner(kind)
        if kind is not None:
            if not _is_text(kind):
                inside = [f"{column}.{name}" for name in fields]
                hint = f"; --text_field can be one of: {', '.join(inside)}" if inside else ""
                raise UsageError(f"{path}: column {column!r} holds {_shown(kind)}, expected text{hint}")
            return names
    known = ", ".join(schema.names)
    raise UsageError(f"{path}: no column {column!r}; --text_field can be one of: {known}")


def _inner(kind: Any) -> dict[str, Any]:
    import pyarrow as pa

    return {field.name: field.type for field in kind} if kind is not None and pa.types.is_struct(kind) else {}


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in (*checks, types.is_binary_view, types.is_null))


def _shown(kind: Any) -> str:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return "an object"
    return "a list" if pa.types.is_nested(kind) else f"{kind}"


def _texts(batches: Iterator[Any], names: list[str], path: Place, column: str, skipped: Skipped) -> Iterator[str]:
    row = 0
    for batch in batches:
        values = batch.column(names[0])
        for name in names[1:]:
            values = _field(values, name)
        for value in values:
            where = f"{path}, row {row}: column {column!r}"
            row += 1
            try:
                text = text_of(_python(value), where)
            except UsageError as error:
                skipped.corrupt(str(error))
            else:
                yield text


def _field(values: Any, name: str) -> Any:
    """Return a field of each struct; the field of a missing struct is missing."""
    import pyarrow.compute as pc

    return pc.struct_field(values, name)


def _python(value: Any) -> Any:
    """Return a value of Arrow; a text that is not valid UTF-8 comes as its bytes."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
