"""Index flat files of tokens that other programs wrote, in place and in one pass over them.

1. Megatron-LM and GPT-NeoX: ``corpus.bin`` with ``corpus.idx``, which says the type and the documents.
2. LitData: a folder of chunks with its ``index.json``.
3. llm.c: a header of 256 numbers. nanoGPT: no header at all, so that the type has to be given.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import UsageError
from ..datamodules.corpora.flat_tokens import FlatFile, FlatIndex
from ..datamodules.corpora.index import INDEX_FILE, Shard
from ..datamodules.corpora.tar import sha256_of
from ..datamodules.corpora.tokens import DTYPES
from ..datamodules.storage.random_access import Bytes, is_remote, open_bytes, read_whole
from ..files import writing
from ..tokenizer_files import load_tokenizer

MEGATRON_MAGIC, OLD_MEGATRON_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
LLM_C = {20240520: "uint16", 20240801: "uint32"}  # magic numbers of its headers
LLM_C_HEADER_BYTES = 1024
READ_TOKENS = 2**22


@dataclass(frozen=True)
class FlatSource:
    """One file of tokens.

    Attributes:
        path: Path or URL.
        dtype: Type of the tokens.
        begin: Offset of the first token, in bytes.
        tokens: Number of tokens.
        documents: Number of documents, 0 if that is not known.
    """

    path: str
    dtype: str
    begin: int
    tokens: int
    documents: int = 0


def is_flat(source: str) -> bool:
    """Return whether a source is a flat file of tokens, or a folder of LitData's."""
    return source.endswith(".bin") or ((Path(source) / INDEX_FILE).is_file() and "chunks" in _json(Path(source)))


def index_flat(
    sources: Sequence[str],
    out: Path,
    sequence_length: int,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> str:
    """Write the index of flat files of tokens.

    Args:
        sources: ``.bin`` files (paths or URLs), and folders of LitData's, in the order of the corpus.
        out: Folder of the index.
        sequence_length: Number of predicted tokens per row.
        dtype: Type of the tokens in files that do not say it.
        tokenizer: Folder or hub name of the tokenizer that made them; without it the vocabulary is taken to end with
            the largest token.
        overwrite: Replace an index that is there.
        progress: Whether to show a progress bar on stderr.

    Returns:
        One line that says what was indexed.

    Raises:
        UsageError: A file that contradicts its index, a type that has no tokens, tokens outside the vocabulary, an
            index that is there already.
    """
    if sequence_length < 1:
        raise UsageError(f"sequence_length is {sequence_length}, expected 1 or more")
    files = [file for source in sources for file in _files(source, dtype)]
    _check_together(files)
    if (out / INDEX_FILE).exists() and not overwrite:
        raise UsageError(f"{out} has an {INDEX_FILE} already; add --overwrite to replace it, or choose another --out")
    if overwrite and (out / INDEX_FILE).exists() and _json(out).get("kind") != "flat":
        raise UsageError(f"{out}/{INDEX_FILE} is not an index of flat files; choose another --out")
    shards, largest = [], 0
    for file in tqdm(files, "indexing", unit="file", disable=not progress):
        shard, highest = _scanned(file, sequence_length)
        shards.append(shard)
        largest = max(largest, highest)
    vocab_size, end_token, sha256 = largest + 1, None, ""
    if tokenizer is not None:
        read = load_tokenizer(tokenizer)
        if largest >= read.vocab_size:
            raise UsageError(f"token {largest} is outside the vocabulary of {read.vocab_size} of {tokenizer}")
        vocab_size, end_token, sha256 = read.vocab_size, read.end_token, read.sha256
        read.save(out / "tokenizer")
    rows, tokens = sum(shard.rows for shard in shards), sum(file.tokens for file in files)
    index = FlatIndex(
        shards=tuple(shards),
        rows=rows,
        sources=tuple(sources),
        dtype=files[0].dtype,
        sequence_length=sequence_length,
        rows_per_sample=1,
        tokens=rows * sequence_length,
        documents=sum(file.documents for file in files),
        dropped_tokens=tokens - len(files) - rows * sequence_length,
        vocab_size=vocab_size,
        end_token=end_token,
        tokenizer_sha256=sha256,
        begins=tuple(file.begin for file in files),
    )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    index.save(out)
    return (
        f"{out}: {rows:,} rows of {sequence_length} tokens in {len(shards)} files, {index.dropped_tokens:,} tokens of "
        "the files' ends dropped"
    )


def verify_flat(folder: str) -> list[str]:
    """Return what differs between flat files and their index, one line each."""
    index, problems = FlatIndex.load(folder), []
    for shard in index.shards:
        try:
            file = FlatFile(index, folder, shard)
        except UsageError as error:
            problems.append(str(error))
            continue
        if (sha256 := sha256_of(file.content)) != shard.sha256:
            problems.append(f"{file.where}: SHA-256 is {sha256}, expected {shard.sha256}; copy or index it again")
    return problems


def _files(source: str, dtype: str | None) -> Iterator[FlatSource]:
    if not source.endswith(".bin"):
        yield from _litdata(Path(source))
        return
    try:
        header = read_whole(f"{source.removesuffix('.bin')}.idx")
    except FileNotFoundError:
        yield _without_index(source, dtype)
    else:
        yield _megatron(source, header)


def _megatron(source: str, header: bytes) -> FlatSource:
    """Read the ``.idx`` of Megatron's MMapIndexedDataset (``megatron/core/datasets/indexed_dataset.py``)."""
    where = f"{source.removesuffix('.bin')}.idx"
    if header.startswith(OLD_MEGATRON_MAGIC):
        raise UsageError(f"{where}: an index of the old kind (--dataset-impl lazy or cached); make one of mmap")
    fixed = struct.Struct("<9sQBQQ")
    if not header.startswith(MEGATRON_MAGIC) or len(header) < fixed.size:
        raise UsageError(f"{where}: not an index of Megatron's; for a plain file of tokens remove it and give --dtype")
    _, version, code, sequences, documents = fixed.unpack_from(header)
    name = MEGATRON_TYPES.get(code, f"number {code}")
    if version != 1:
        raise UsageError(f"{where}: version is {version}, expected 1")
    _check_dtype(name, where)
    expected = fixed.size + 12 * sequences + 8 * documents
    if len(header) < expected:
        raise UsageError(f"{where}: {len(header)} bytes found, {expected} expected; copy it again")
    sizes = np.frombuffer(header, "<i4", sequences, fixed.size).astype(np.int64)
    pointers = np.frombuffer(header, "<i8", sequences, fixed.size + 4 * sequences)
    ends = np.cumsum(sizes * np.dtype(name).itemsize)
    if sequences == 0 or (sizes < 0).any() or (pointers != np.concatenate([[0], ends[:-1]])).any():
        raise UsageError(f"{where}: its sequences do not follow each other in the file; merge the data again")
    size = _size(source)
    if size != ends[-1]:
        raise UsageError(f"{source}: {size} bytes found, {ends[-1]} expected by its .idx; copy it again")
    return FlatSource(source, name, 0, int(sizes.sum()), max(0, documents - 1))


def _without_index(source: str, dtype: str | None) -> FlatSource:
    content = open_bytes(source)
    numbers = np.frombuffer(content.read(0, min(12, content.size // 4 * 4)), "<i4").tolist()
    content.close()
    if len(numbers) == 3 and numbers[0] in LLM_C and numbers[1] == 1:
        found = FlatSource(source, LLM_C[numbers[0]], LLM_C_HEADER_BYTES, numbers[2])
        size = found.begin + found.tokens * np.dtype(found.dtype).itemsize
        if content.size != size:
            raise UsageError(f"{source}: {content.size} bytes found, {size} expected by its header; copy it again")
        return found
    if dtype is None:
        raise UsageError(f"{source}: no .idx next to it and no header says the type of its tokens; give --dtype uint16")
    _check_dtype(dtype, source)
    tokens, rest = divmod(content.size, np.dtype(dtype).itemsize)
    if rest:
        raise UsageError(f"{source}: {content.size} bytes are not a whole number of {dtype} tokens")
    return FlatSource(source, dtype, 0, tokens)


def _litdata(folder: Path) -> Iterator[FlatSource]:
    """Read the ``index.json`` of LitData's chunks of tokens (``litdata/streaming/item_loader.py``, TokensLoader)."""
    where, content = folder / INDEX_FILE, _json(folder)
    config = content.get("config") or {}
    formats = config.get("data_format") or [""]
    if len(formats) != 1 or not str(formats[0]).startswith(("no_header_tensor:", "no_header_numpy:")):
        raise UsageError(f"{where}: data_format is {formats}, expected tokens as one no_header_tensor per item")
    if config.get("compression"):
        raise UsageError(f"{where}: the chunks are compressed with {config['compression']}; write them without")
    for chunk in content["chunks"]:
        path, tokens = folder / chunk["filename"], chunk.get("dim")
        begin = 4 * (chunk["chunk_size"] + 2)  # the number of items, and an offset for each and for the end
        size = _size(str(path))
        width, rest = divmod(size - begin, tokens) if tokens else (0, 1)
        name = {2: "uint16", 4: "int32", 8: "int64"}.get(width)
        if rest or name is None:
            raise UsageError(f"{path}: {size} bytes do not hold the {tokens} tokens of index.json; copy it again")
        yield FlatSource(str(path), name, begin, tokens, chunk["chunk_size"])


def _check_dtype(name: str, where: str) -> None:
    if name not in DTYPES:
        raise UsageError(f"{where}: the type of the tokens is {name}, expected {', '.join(DTYPES)}")


def _check_together(files: Sequence[FlatSource]) -> None:
    if not files:
        raise UsageError("no file of tokens given; expected .bin files, or folders of LitData's chunks")
    names = [file.path.rsplit("/", 1)[-1] for file in files]
    for file, name in zip(files, names, strict=True):
        if file.dtype != files[0].dtype:
            raise UsageError(f"{file.path} has {file.dtype} tokens, {files[0].path} {files[0].dtype}: index them apart")
        if names.count(name) > 1:
            raise UsageError(f"two files are called {name}: index each folder by itself, as a corpus of its own")


def _scanned(file: FlatSource, sequence_length: int) -> tuple[Shard, int]:
    """Return the entry of a file in the index, and its largest token."""
    content = open_bytes(file.path)
    rows = max(0, file.tokens - 1) // sequence_length
    if not rows:
        raise UsageError(f"{file.path}: {file.tokens} tokens fill no row of {sequence_length + 1}")
    largest = _largest(content, file)
    name = file.path.rsplit("/", 1)[-1]
    url = file.path if is_remote(file.path) else str(Path(file.path).resolve())
    shard = Shard(name, content.size, rows, rows, sha256_of(content), url)
    content.close()
    return shard, largest


def _largest(content: Bytes, file: FlatSource) -> int:
    dtype, largest = np.dtype(file.dtype).newbyteorder("<"), 0
    for first in range(0, file.tokens, READ_TOKENS):
        begin = file.begin + first * dtype.itemsize
        end = file.begin + min(first + READ_TOKENS, file.tokens) * dtype.itemsize
        tokens = np.frombuffer(content.read(begin, end), dtype)
        if tokens.min() < 0:
            place = first + int(tokens.argmin())
            raise UsageError(f"{file.path}: token {tokens.min()} at position {place}: is {file.dtype} its type?")
        largest = max(largest, int(tokens.max()))
    return largest


def _size(path: str) -> int:
    content = open_bytes(path)
    size = content.size
    content.close()
    return size


def _json(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / INDEX_FILE).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / INDEX_FILE}: cannot be read ({error})") from None
    return content if isinstance(content, dict) else {}
