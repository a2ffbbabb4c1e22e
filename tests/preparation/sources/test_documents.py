"""Every kind of source file gives the same documents, and a fault is reported in one line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from rewurst import UsageError
from rewurst.preparation.sources import compressed_files as streams
from rewurst.preparation.sources import documents as sources
from rewurst.preparation.sources import records
from rewurst.preparation.sources.documents import Skipped, expand, read

DOCUMENTS = ["The first.\nTwo lines.", "Zweites: äöü, 你好, 😀", "x" * 500, "fourth\r\n"]


def documents(given: list[str], text_field: str = "text", skipped: Skipped | None = None) -> list[str]:
    """Return whole documents, with their pieces joined."""
    skipped = skipped or Skipped()
    found, parts = [], []
    for file in expand(given, skipped):
        for piece in read(file, text_field, skipped):
            parts.append(piece.text)
            if piece.ends_document:
                found.append("".join(parts))
                parts = []
    assert parts == [], "the last document has no end"
    return found


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def put(path: Path, content: bytes) -> Path:
    """Write ``content`` compressed as the suffix says."""
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd.compress}
    path.write_bytes(compress.get(path.suffix, bytes)(content))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz", ".md.gz", ".txt.zst", ".md.zst", ".TXT"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    for i, text in enumerate(DOCUMENTS):
        put(tmp_path / f"{i}{suffix}", text.encode())
    assert documents([str(tmp_path)]) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_give_the_same_documents(tmp_path: Path, suffix: str) -> None:
    assert documents([str(put(tmp_path / f"a{suffix}", json_lines(DOCUMENTS)))]) == DOCUMENTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_gives_the_same_documents(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"id": range(4), "body": pa.array(DOCUMENTS).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert documents([str(tmp_path / "a.parquet")], text_field="body") == DOCUMENTS


def test_compressed_files_of_several_frames_are_read_to_the_end(tmp_path: Path) -> None:
    parts = [json_lines([text]) for text in DOCUMENTS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(map(zstd.compress, parts)))
    assert documents([str(tmp_path)]) == DOCUMENTS * 2


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_frames_with_long_windows_are_read(tmp_path: Path, window_log: int) -> None:
    """As written by `zstd --long`, for example in dumps of forums and The Pile."""
    options = {zstd.CompressionParameter.window_log: window_log}
    compressor = zstd.ZstdCompressor(options=options)
    whole = b"".join(compressor.compress(json_lines([text])) for text in DOCUMENTS) + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    assert documents([str(tmp_path)]) == DOCUMENTS


def test_skippable_frames_are_skipped(tmp_path: Path) -> None:
    note = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    first, second = (zstd.compress(json_lines(part)) for part in (DOCUMENTS[:2], DOCUMENTS[2:]))
    (tmp_path / "a.jsonl.zst").write_bytes(note + first + note + second)
    assert documents([str(tmp_path)]) == DOCUMENTS


@pytest.mark.parametrize("cut", [1, 4, 9, 20])
def test_a_truncated_frame_is_one_line(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(json_lines(DOCUMENTS))[:-cut])
    with pytest.raises(UsageError, match=r"a\.jsonl\.zst: truncated or damaged \.zst file \(.*end-of-stream"):
        documents([str(tmp_path)])


def test_folders_are_read_in_the_order_of_their_paths_and_unknown_files_are_counted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.txt", "a/b/c.txt", "photo.png", "Makefile"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    skipped = Skipped()
    assert documents([str(tmp_path)], skipped=skipped) == ["a/b/c.txt", "a/z.md", "a.txt", "b.txt"]
    assert sorted(Path(name).name for name in skipped.unknown_files) == ["Makefile", "link", "photo.png"]
    assert skipped.report().startswith("3 files of unknown kind, or links to folders, skipped (the first: ")


def test_sources_are_read_in_the_order_given(tmp_path: Path) -> None:
    names = [str(put(tmp_path / f"{name}.txt", name.encode())) for name in "ba"]
    assert documents(names) == ["b", "a"]


def test_empty_documents_are_counted_and_broken_surrogates_repaired(tmp_path: Path) -> None:
    lines = ['{"text": ""}', "", '{"text": " \\n"}', '{"text": null}', '{"text": "\\ud83d\\ude00 \\ud83d"}']
    put(tmp_path / "a.jsonl", "\n".join(lines).encode())
    put(tmp_path / "b.txt", b"")
    put(tmp_path / "c.txt", b" \n")
    skipped = Skipped()
    assert documents([str(tmp_path)], skipped=skipped) == ["😀 �"]
    assert (skipped.empty_documents, skipped.repaired_documents) == (6, 1)
    assert skipped.report().startswith("6 empty documents skipped; 1 documents with half a surrogate pair")


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "\ufeffone".encode())
    put(tmp_path / "b.jsonl", "\ufeff".encode() + json_lines(["two"]))
    assert documents([str(tmp_path)]) == ["one", "two"]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="a\né😀 ", min_size=1, max_size=200).filter(lambda text: not text.isspace()),
    piece=st.integers(1, 12),
    block=st.integers(1, 9),
)
def test_long_documents_come_in_pieces_cut_at_line_ends(
    tmp_path_factory: pytest.TempPathFactory, text: str, piece: int, block: int
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    put(folder / "a.txt", text.encode())
    put(folder / "b.jsonl", json_lines([text]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARS", piece)
        patch.setattr(streams, "BLOCK_BYTES", block)  # what is read at a time must not show
        found = [list(read(file, "text", Skipped())) for file in expand([str(folder)], Skipped())]
    assert found[0] == found[1]
    assert "".join(part.text for part in found[0]) == text
    assert [part.ends_document for part in found[0]] == [False] * (len(found[0]) - 1) + [True]
    for part in found[0][:-1]:
        assert part.text.endswith("\n") or (len(part.text) == piece and "\n" not in part.text)
    assert max(len(part.text) for part in found[0]) <= piece


def test_a_file_without_a_line_end_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is lazy: the first pieces come before the invalid bytes at the end are met."""
    monkeypatch.setattr(sources, "PIECE_CHARS", 1000)
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1000)
    pieces = read(expand([str(put(tmp_path / "a.txt", b"x" * 10000 + b"\xff"))], Skipped())[0], "text", Skipped())
    assert [len(next(pieces).text) for _ in range(8)] == [1000] * 8
    with pytest.raises(UsageError, match="byte 10000"):
        list(pieces)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def parquet(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path)


KNOWN = (
    r"\.txt, \.md, \.jsonl, \.json, \.csv, \.tsv \(or these with \.gz or \.zst or \.bz2 or \.xz\), \.parquet, "
    r"\.arrow, \.tar, a folder, builtin:prose or builtin:code"
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", rf"source .*a\.pdf: unknown kind '\.pdf', expected {KNOWN}"),
        ("a.parquet.gz", b"x", r"unknown kind '\.gz'"),
        ("README", b"x", "unknown kind 'README'"),
        ("a.txt", b"ok \xe4\xf6", r"a\.txt: byte 3 \(0xe4\) is not valid UTF-8"),
        ("a.txt", "cut: ä".encode()[:-1], r"a\.txt: byte 5 \(0xc3\) is not valid UTF-8"),
        ("a.txt.gz", b"ok \xff", r"a\.txt\.gz: byte 3 \(0xff\) is not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl: byte 24 \(0xff\) is not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2: not valid JSON \("),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: a line holds a list, expected an object"),
        ("a.jsonl", b'{"id": 1, "body": "x"}', r"a\.jsonl:1: no field 'text'; --text_field can be one of: id, body"),
        ("a.jsonl", b'\n{"text": 5}', r"a\.jsonl:2: field 'text' holds a number, expected text"),
        ("a.parquet", b"x", r"a\.parquet: not a readable Parquet file \("),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(UsageError, match=message) as error:
        documents([str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_truncated_and_damaged_compression(tmp_path: Path, kind: str, suffix: str) -> None:
    path = put(tmp_path / f"a.{kind}.{suffix}", json_lines([str(i) for i in range(1000)]))
    truncated(path)
    with pytest.raises(UsageError, match=rf"a\.{kind}\.{suffix}: truncated or damaged \.{suffix} file"):
        documents([str(path)])
    path.write_bytes(b"not compressed at all")
    with pytest.raises(UsageError, match=rf"a\.{kind}\.{suffix}: truncated or damaged \.{suffix} file"):
        documents([str(path)])


def test_parquet_columns_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", id=[1], body=["x"])
    with pytest.raises(UsageError, match=r"a\.parquet: no column 'text'; --text_field can be one of: id, body"):
        documents([str(tmp_path)])
    with pytest.raises(UsageError, match=r"a\.parquet: column 'id' holds int64, expected text"):
        documents([str(tmp_path)], text_field="id")


def test_a_line_that_memory_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_BYTES", 100)
    put(tmp_path / "a.jsonl", json_lines(["a", "b" * 100]))
    with pytest.raises(UsageError, match=r"a\.jsonl:2: line is longer than 100 bytes; cut the document"):
        documents([str(tmp_path)])


def test_missing_paths(tmp_path: Path) -> None:
    put(tmp_path / "corpus.jsonl", b"")
    (tmp_path / "empty").mkdir()
    for source, message in [
        (
            f"{tmp_path}/corpsu.jsonl",
            rf"corpsu\.jsonl: no such file or folder; did you mean {tmp_path}/corpus\.jsonl\?",
        ),
        (f"{tmp_path}/zzz", r"zzz: no such file or folder$"),
        (f"{tmp_path}/empty", f"empty: the folder has no file of a known kind, expected {KNOWN}"),
        ("builtin:proze", "builtin:proze: no such built-in corpus, expected .*; did you mean builtin:prose?"),
    ]:
        with pytest.raises(UsageError, match=message):
            expand([source], Skipped())
    with pytest.raises(UsageError, match=f"no sources given, expected {KNOWN}"):
        expand([], Skipped())


def test_captions_of_image_shards(tmp_path: Path) -> None:
    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "a-000000.tar")) as writer:
        for number, caption in enumerate(["a red disc", "", "ein grüner Kreis"]):
            writer.write({"__key__": f"{number}", "png": b"no picture is read", "txt": caption})
    (tmp_path / "a-000000.idx").write_bytes(b"")
    skipped = Skipped()
    texts = [piece.text for file in expand([str(tmp_path)], skipped) for piece in read(file, "text", skipped)]
    assert texts == ["a red disc", "ein grüner Kreis"]
    assert skipped.empty_documents == 1
