"""Sources to token shards, for training and for validation.

1. ``sources`` gives pieces of documents in one fixed order.
2. A hash of the document's beginning says whether it is held out: equal documents are on the same side.
3. ``encoding`` turns them into tokens in worker processes, an end token after each document.
4. One ordered pass packs the tokens of either side into rows and shards (``packing``).
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .. import UsageError
from .encoding import Text, encode
from .folders import CORPUS_LAYOUT, make_folder, shard_name
from .integrity import verify
from .packing import TokenWriter
from .sources import Skipped, SourceFile, expand, read
from .token_index import TokenIndex
from .tokenizer import TokenizerFiles, load_tokenizer, train_tokenizer

__all__ = ["prepare_text", "train_tokenizer", "verify"]


def prepare_text(
    sources: Sequence[str],
    tokenizer: str,
    out: Path,
    *,
    sequence_length: int = 2048,
    held_out: float = 0.0,
    workers: int = 1,
    text_field: str = "text",
    rows_per_shard: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, TokenIndex]:
    """Tokenize sources into ``out/train`` and, with ``held_out`` above 0, ``out/val``.

    The same input gives the same bytes, whatever the number of workers. When it fails, no index is left behind.

    Args:
        sources: Files, folders and built-in corpora (see ``sources.expand``).
        tokenizer: Folder with a ``tokenizer.json``, or hub name.
        out: Folder, empty or new.
        sequence_length: Predicted tokens a row.
        held_out: Share of the documents for validation, in [0, 1).
        workers: Processes that tokenize; with 0 or 1 this one does.
        text_field: Field of JSON lines, column of Parquet files.
        rows_per_shard: By default shards have about 256 MiB.
        overwrite: Replace what an earlier preparation left in ``out``.
        progress: Show a progress bar on stderr.

    Returns:
        The index of each side: ``train``, and ``val`` where something is held out.

    Raises:
        UsageError: Arguments out of range, sources or a tokenizer that cannot be read, too little text for one row, an
            ``out`` that is not empty, a full disk.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is {held_out}, expected a share of the documents from 0 to below 1")
    if workers < 0:
        raise UsageError(f"workers is {workers}, expected 0 or more")
    skipped = Skipped()
    files, read_tokenizer = expand(sources, skipped), load_tokenizer(tokenizer)
    sides = ("train", "val") if held_out else ("train",)
    writers = {
        side: TokenWriter(
            out / side,
            name=shard_name(sources[0], otherwise="text"),
            sequence_length=sequence_length,
            vocab_size=read_tokenizer.vocab_size,
            end_token=read_tokenizer.end_token,
            tokenizer_sha256=read_tokenizer.sha256,
            sources=tuple(sources),
            rows_per_shard=rows_per_shard,
        )
        for side in sides
    }
    make_folder(out, CORPUS_LAYOUT, overwrite)
    try:
        texts = _texts(files, text_field, held_out, skipped)
        _write(list(writers.values()), texts, read_tokenizer, workers, progress)
        for writer in writers.values():
            read_tokenizer.save(writer.folder / "tokenizer")
        # The held-out side first: it is the one that may be too small, and whole corpora have an index.
        indices = {side: _close(writers[side], held_out) for side in reversed(sides)}
    except BaseException:
        for writer in writers.values():
            writer.abort()
            shutil.rmtree(writer.folder, ignore_errors=True)  # it did not exist, so all in it is ours
        raise
    for side in sides:
        print(_summary(out / side, indices[side]), file=sys.stderr)
    if report := skipped.report():
        print(report, file=sys.stderr)
    return {side: indices[side] for side in sides}


def is_held_out(beginning: str, share: float) -> bool:
    """Whether a document that begins so (its first piece) is for validation; it depends on nothing else."""
    digest = hashlib.blake2b(beginning.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _texts(files: Sequence[SourceFile], text_field: str, held_out: float, skipped: Skipped) -> Iterator[Text]:
    stream, begins = 0, True
    for file in files:
        for piece in read(file, text_field, skipped):
            if begins:
                stream = int(is_held_out(piece.text, held_out))
            yield Text(stream, piece.text, piece.ends_document)
            begins = piece.ends_document


def _write(
    writers: Sequence[TokenWriter], texts: Iterator[Text], tokenizer: TokenizerFiles, workers: int, progress: bool
) -> None:
    documents = 0
    with tqdm(unit=" tokens", unit_scale=True, desc="tokenizing", disable=not progress, file=sys.stderr) as bar:
        for encoded in encode(texts, tokenizer.json, tokenizer.end_token, workers):
            writers[encoded.stream].append(encoded.tokens, encoded.documents)
            documents += encoded.documents
            bar.set_postfix(documents=documents, refresh=False)
            bar.update(len(encoded.tokens))


def _close(writer: TokenWriter, held_out: float) -> TokenIndex:
    try:
        return writer.close()
    except UsageError as error:
        raise UsageError(f"{error} (held_out is {held_out})" if held_out else str(error)) from None


def _summary(folder: Path, index: TokenIndex) -> str:
    return (
        f"{folder}: {index.documents} documents, {index.tokens} tokens in {index.rows} rows of "
        f"{index.sequence_length}, {len(index.shards)} shards, {index.dropped_tokens} tokens of the tail dropped"
    )
