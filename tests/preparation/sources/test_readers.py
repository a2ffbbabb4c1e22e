"""Every reader of records gives the same documents and meets every fault in the same way: counted, named, bounded."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from rewurst import UsageError
from rewurst.preparation.sources import compressed_files, records
from rewurst.preparation.sources.documents import read
from rewurst.preparation.sources.skipped import Skipped
from rewurst.preparation.sources.source_files import expand

DOCUMENTS = ["The first.\nTwo lines.", 'Zweites: äöü, "你好", 😀', "x," * 250, "fourth\r\n", "[1]\t{}"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
BAD = b"caf\xe9"  # as cp1252 writes it

Rows = list[dict[str, Any]]


def jsonl(rows: Rows) -> bytes:
    return b"".join(_json(row) + b"\n" for row in rows)


def json_list(rows: Rows) -> bytes:
    return b"[\n  " + b",\n  ".join(map(_json, rows)) + b"\n]\n"


def _json(row: dict[str, Any], indent: int | None = None) -> bytes:
    row = {name: "BAD" if value == BAD else value for name, value in row.items()}
    return json.dumps(row, indent=indent).encode().replace(b'"BAD"', b'"' + BAD + b'"')


def json_objects(rows: Rows) -> bytes:
    return b"".join(_json(row, indent=1) + b"\n" for row in rows)


def table(rows: Rows, delimiter: str = ",") -> bytes:
    names = [*dict.fromkeys(name for row in rows for name in row)]
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(names)
    for row in rows:
        writer.writerow(["BAD" if row[name] == BAD else row[name] for name in names if name in row])
    return file.getvalue().encode().replace(b"BAD", BAD)


def tsv(rows: Rows) -> bytes:
    return table(rows, "\t")


def arrow_table(rows: Rows) -> pa.Table:
    """A column of strings whose bytes are not checked, as writers in other languages leave them."""
    texts = [row.get("text") for row in rows]
    column = pa.array([text.encode() if isinstance(text, str) else text for text in texts], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(column), column.buffers())
    return pa.table({"id": [row["id"] for row in rows], "text": strings})


def parquet(rows: Rows) -> bytes:
    file = io.BytesIO()
    pq.write_table(arrow_table(rows), file, row_group_size=3)
    return file.getvalue()


def arrow_stream(rows: Rows) -> bytes:
    return _arrow(rows, pa.ipc.new_stream)


def arrow_file(rows: Rows) -> bytes:
    return _arrow(rows, pa.ipc.new_file)


def _arrow(rows: Rows, writer: Any) -> bytes:
    file = io.BytesIO()
    with writer(file, arrow_table(rows).schema) as opened:
        opened.write_table(arrow_table(rows), max_chunksize=2)
    return file.getvalue()


READERS: dict[str, tuple[str, Callable[[Rows], bytes]]] = {
    "jsonl": (".jsonl", jsonl),
    "json lines": (".json", jsonl),
    "json list": (".json", json_list),
    "json objects": (".json", json_objects),
    "csv": (".csv", table),
    "tsv": (".tsv", tsv),
    "parquet": (".parquet", parquet),
    "arrow stream": (".arrow", arrow_stream),
    "arrow file": (".arrow", arrow_file),
}
BINARY = ("parquet", "arrow stream", "arrow file")


def rows_of(texts: list[Any]) -> Rows:
    return [{"id": i, "text": text} for i, text in enumerate(texts)]


def read_all(path: Path, skipped: Skipped, field: str = "text", separator: str | None = None) -> list[str]:
    found, parts = [], []
    for file in expand([str(path)], skipped):
        for piece in read(file, field, skipped, separator):
            parts.append(piece.text)
            if piece.ends_document:
                if not piece.corrupt:
                    found.append("".join(parts))
                parts = []
    assert not parts
    return found


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_the_same_documents(
    tmp_path: Path, reader: str, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed_files, "BLOCK_BYTES", 7)  # what is read at a time must not show
    suffix, write = READERS[reader]
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](write(rows_of(DOCUMENTS))))
    if compression and reader in BINARY:
        with pytest.raises(UsageError, match=rf"unknown kind '\{compression}'"):
            expand([str(path)], Skipped())
        return
    skipped = Skipped()
    assert read_all(path, skipped) == DOCUMENTS
    assert (skipped.documents, skipped.corrupt_documents) == (len(DOCUMENTS), 0)


@pytest.mark.parametrize("place", [0, 7, 19])
@pytest.mark.parametrize("fault", ["a byte of cp1252", "another type", "no such field", "not a record", "null"])
@pytest.mark.parametrize("reader", READERS)
def test_one_bad_record_is_skipped_counted_and_named(tmp_path: Path, reader: str, fault: str, place: int) -> None:
    suffix, write = READERS[reader]
    rows = rows_of([f"document {i}" for i in range(20)])
    expected = [row["text"] for i, row in enumerate(rows) if i != place]
    reason = {
        "a byte of cp1252": "0xe9",
        "another type": "a number",
        "no such field": "field 'text'|values, the first row names|no column 'text'",
        "not a record": "not valid JSON|expected an object|not a row of CSV",
    }
    if fault == "a byte of cp1252":
        rows[place]["text"] = BAD
    elif fault == "another type":
        rows[place]["text"] = 5
    elif fault == "no such field":
        del rows[place]["text"]
    elif fault == "null":
        rows[place]["text"] = None
    if (reader in BINARY and fault in ("another type", "no such field", "not a record")) or (
        reader in ("csv", "tsv") and fault == "another type"
    ):
        pytest.skip("the format has one type for all rows")
    if reader == "json objects" and fault == "not a record" and place == 0:
        pytest.skip("the file is a list then")
    content = write(rows)
    if fault == "not a record":
        content = _not_a_record(reader, content, place)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    skipped = Skipped(max_corrupt=0.05)
    assert read_all(path, skipped) == expected
    skipped.check(path.stat().st_size, final=True)
    assert skipped.documents == 20
    if fault == "null":
        assert (skipped.empty_documents, skipped.corrupt_documents) == (1, 0)
        return
    assert skipped.corrupt_documents == 1
    assert "1 of 20 documents are corrupt and skipped; the first: " in skipped.report()
    [named] = skipped.first
    assert f"a{suffix}" in named
    assert any(word in named for word in reason[fault].split("|"))
    with pytest.raises(UsageError, match="1 of 20 documents are corrupt, more than max_corrupt"):
        Skipped(**{**vars(skipped), "max_corrupt": 0.04}).check(1, final=True)
    with pytest.raises(UsageError) as error:
        read_all(path, Skipped())  # nothing may be corrupt
    assert str(error.value) == named


def _not_a_record(reader: str, content: bytes, place: int) -> bytes:
    if reader in ("json list", "json objects"):
        row = json.dumps({"id": place, "text": f"document {place}"}, indent=1 if reader == "json objects" else None)
        return content.replace(row.encode(), b"[1, 2]", 1)
    lines = content.splitlines(keepends=True)
    number = place + (reader in ("csv", "tsv"))
    lines[number] = b'1,"a" b\n' if reader == "csv" else b'1\t"a" b\n' if reader == "tsv" else b'{"id": 1, "te\n'
    return b"".join(lines)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("reader", ["txt", *READERS])
def test_a_truncated_file_gives_what_comes_before_and_counts_by_its_size(
    tmp_path: Path, reader: str, compression: str
) -> None:
    suffix, write = READERS.get(reader, (".txt", jsonl))
    rows = rows_of([f"document {i} {i * 7919 % 1013} {i * 104729 % 7919}" for i in range(3000)])
    content = COMPRESS[compression](write(rows))
    if (compression and reader in BINARY) or (
        not compression and reader in ("txt", "jsonl", "json lines", "csv", "tsv")
    ):
        pytest.skip("no such file, or one that is not damaged but has a last line cut short")
    bad, good = tmp_path / f"a{suffix}{compression}", tmp_path / f"b{suffix}{compression}"
    bad.write_bytes(content[: len(content) // 2])
    good.write_bytes(content)
    skipped = Skipped(max_corrupt=0.5)
    texts = read_all(tmp_path, skipped)
    if reader == "txt":
        assert texts == [content.decode()] if not compression else len(texts) == 1
    else:
        first = [row["text"] for row in rows]
        assert texts[-3000:] == first
        assert texts[:-3000] == first[: len(texts) - 3000]
        assert len(texts) < 6000
    assert (skipped.damaged_files, skipped.damaged_bytes) == (1, len(content) // 2)
    skipped.check(len(content) * 3 // 2, final=True)
    assert f"a{suffix}{compression}" in skipped.report()
    with pytest.raises(UsageError, match="bytes are in damaged files, more than max_corrupt"):
        Skipped(**{**vars(skipped), "max_corrupt": 0.1}).check(len(content) * 3 // 2, final=False)
    with pytest.raises(UsageError, match=rf"a{suffix}{compression}"):
        read_all(tmp_path, Skipped())


@pytest.mark.parametrize("reader", ["jsonl", "json lines", "json list", "json objects", "parquet", "arrow stream"])
def test_a_field_within_a_field_is_a_path(tmp_path: Path, reader: str) -> None:
    suffix, write = READERS[reader]
    rows: Rows = [{"id": i, "raw": {"text": text, "lines": [1]}} for i, text in enumerate(DOCUMENTS)]
    rows.append({"id": 9, "raw": {"text": None, "lines": [1]}})
    if reader == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    elif reader == "arrow stream":
        with pa.ipc.new_stream(tmp_path / "a.arrow", pa.Table.from_pylist(rows).schema) as file:
            file.write_table(pa.Table.from_pylist(rows))
    else:
        (tmp_path / f"a{suffix}").write_bytes(write(rows))
    skipped = Skipped()
    assert read_all(tmp_path, skipped, "raw.text") == DOCUMENTS
    assert skipped.empty_documents == 1
    with pytest.raises(UsageError, match=r"raw\.text"):
        read_all(tmp_path, Skipped(), "raw")
    with pytest.raises(UsageError, match=r"raw\.nothing"):
        read_all(tmp_path, Skipped(), "raw.nothing")


def test_a_field_of_a_missing_object_is_an_empty_document(tmp_path: Path) -> None:
    rows = pa.array([{"text": "a"}, None, {"text": "b"}], pa.struct([("text", pa.string())]))
    pq.write_table(pa.table({"raw": rows}), tmp_path / "a.parquet")
    skipped = Skipped()
    assert read_all(tmp_path, skipped, "raw.text") == ["a", "b"]
    assert skipped.empty_documents == 1


def test_a_column_whose_name_has_a_dot(tmp_path: Path) -> None:
    pq.write_table(pa.table({"raw.text": ["a"], "raw": ["b"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"raw.text": "a", "raw": {"text": "b"}}')
    assert read_all(tmp_path, Skipped(), "raw.text") == ["a", "a"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_a_column_of_bytes_is_utf8(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array([text.encode() for text in DOCUMENTS] + [BAD], pa.binary()).cast(kind)
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    skipped = Skipped(max_corrupt=0.5)
    assert read_all(tmp_path, skipped) == DOCUMENTS
    assert skipped.first == [f"{tmp_path}/a.parquet, row 5: column 'text': byte 3 (0xe9) is not valid UTF-8"]


@pytest.mark.parametrize("kind", ["struct", "list", "number"])
def test_columns_without_text_are_refused_by_their_type(tmp_path: Path, kind: str) -> None:
    values: dict[str, list[Any]] = {"struct": [{"a": "x"}], "list": [["x"]], "number": [1.5]}
    pq.write_table(pa.table({"text": values[kind]}), tmp_path / "a.parquet")
    message = {
        "struct": r"an object, expected text; --text_field can be one of: text\.a",
        "list": "a list",
        "number": "double",
    }
    with pytest.raises(UsageError, match=f"column 'text' holds {message[kind]}"):
        read_all(tmp_path, Skipped(max_corrupt=1))


def _dataset(folder: Path, parts: list[list[str]]) -> None:
    """As `datasets.save_to_disk` writes it; the order of the files is that of state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{len(parts) - i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        (folder / name).write_bytes(arrow_stream(rows_of(texts)))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-1234.arrow").write_bytes(arrow_stream(rows_of(["a cached copy"])))


def test_a_saved_data_set_is_read_in_its_order_without_its_description(tmp_path: Path) -> None:
    _dataset(tmp_path / "in/set", [["a", "b"], ["c"]])
    (tmp_path / "in/z.txt").write_text("d")
    (tmp_path / "in/set/cache-1234.arrow").unlink()
    skipped = Skipped()
    assert read_all(tmp_path / "in", skipped) == ["a", "b", "c", "d"]
    assert skipped.report() == ""


def test_splits_of_a_data_set_are_not_mixed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _dataset(tmp_path / "set" / split, [[split]])
        (tmp_path / "set" / split / "cache-1234.arrow").unlink()
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UsageError, match="set: a data set with the splits train, test; name the one to read"):
        expand([str(tmp_path / "set")], Skipped())
    assert read_all(tmp_path / "set/train", Skipped()) == ["train"]


def test_a_data_set_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    _dataset(tmp_path / "set", [["a"], ["b"]])
    (tmp_path / "set/data-00001-of-00002.arrow").unlink()
    with pytest.raises(UsageError, match=r"data-00001-of-00002\.arrow, which state\.json lists, is not there"):
        expand([str(tmp_path / "set")], Skipped())


def test_skipped_files_are_counted_by_kind(tmp_path: Path) -> None:
    for name in ("a.txt", "b.pdf", "c.pdf", "d.docx"):
        (tmp_path / name).write_text("x")
    skipped = Skipped()
    read_all(tmp_path, skipped)
    assert ".pdf 2, .docx 1" in skipped.report()


@pytest.mark.parametrize("block", [1, 3, 7, 2**18])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_or_a_text_separate_the_documents_of_a_file(
    tmp_path: Path, newline: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed_files, "BLOCK_BYTES", block)
    texts = [f"one{newline}line", "zwei ä", "drei"]
    blank = [newline * 2, f"{newline} {newline}{newline}"]
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeff" + texts[0] + blank[0] + texts[1] + blank[1] + texts[2] + blank[0]).encode())
    assert read_all(path, Skipped(), separator="blank-line") == texts
    path.write_bytes("<|end|>".join(texts).encode())
    assert read_all(path, Skipped(), separator="<|end|>") == texts
    assert read_all(path, Skipped()) == ["<|end|>".join(texts)]


def test_one_bad_document_of_a_separated_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_BYTES", 50)
    monkeypatch.setattr(compressed_files, "BLOCK_BYTES", 16)
    path = tmp_path / "a.md"
    path.write_bytes(b"one\n\n" + BAD + b"\n\n" + b"x" * 300 + b"\n\nfour\n\n" + BAD)
    skipped = Skipped(max_corrupt=0.9)
    assert read_all(path, skipped, separator="blank-line") == ["one", "four"]
    assert (skipped.documents, skipped.corrupt_documents) == (5, 3)
    assert [text.partition(": ")[2][:22] for text in skipped.first] == [
        "byte 8 (0xe9) is not v",
        "the document at byte 1",
        "byte 322 (0xe9) is not",
    ]


def _tar(captions: list[bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for i, caption in enumerate(captions):
            for suffix, data in (("png", b"no picture is read"), ("txt", caption)):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return content.getvalue()


def test_a_bad_caption_and_a_truncated_tar(tmp_path: Path) -> None:
    captions = [f"caption {i}".encode() for i in range(20)]
    path = tmp_path / "a.tar"
    path.write_bytes(_tar([*captions[:3], BAD, *captions[3:]]))
    skipped = Skipped(max_corrupt=0.05)
    assert read_all(path, skipped) == [caption.decode() for caption in captions]
    assert skipped.corrupt_documents == 1
    assert "byte 3 (0xe9) is not valid UTF-8" in skipped.first[0]
    path.write_bytes(_tar(captions)[:15000])
    skipped = Skipped(max_corrupt=0.05)
    found = read_all(path, skipped)
    assert found == [caption.decode() for caption in captions[: len(found)]]
    assert 0 < len(found) < 20
    assert (skipped.damaged_files, skipped.damaged_bytes) == (1, 15000)
