"""Turn text sources into token shards, for training and for validation.

1. ``sources`` reads documents in pieces, in a fixed order.
2. A hash of the document's beginning decides whether it is held out: equal documents are on the same side.
3. ``steps.tokenizing`` turns them into tokens in worker processes, with an end token after each document.
4. ``engine.text_units`` packs the tokens of each side into rows and shards, and keeps what is done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from .. import UsageError
from ..datamodules.corpora.tokens import TokenIndex
from ..datamodules.storage.random_access import join
from ..tokenizer_files import load_tokenizer
from .engine import open_engine
from .engine.resumable_units import begin
from .engine.text_units import TextJob, prepare_text_units
from .sources.skipped import Skipped
from .sources.source_files import PLAIN_TEXT, SourceFile, expand
from .steps.sections import is_held_out
from .tokenizer import train_tokenizer
from .verify import verify
from .writing.destination import Target, everywhere
from .writing.folders import CORPUS_LAYOUT, shard_name
from .writing.row_layout import RowLayout

__all__ = ["is_held_out", "prepare_text", "train_tokenizer", "verify"]


def prepare_text(
    sources: Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    sequence_length: int = 2048,
    held_out: float = 0.0,
    workers: int | None = None,
    text_field: str = "text",
    document_separator: str | None = None,
    max_corrupt: float = 0.05,
    max_unknown: float = 0.01,
    rows_per_shard: int | None = None,
    overwrite: bool = False,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    progress: bool = True,
    end_token: str | None = None,
    prompt_field: str | None = None,
) -> dict[str, TokenIndex]:
    """Tokenize sources into ``out/train`` and, with ``held_out`` above 0, ``out/val``.

    A document is a line of .jsonl, an element or a line of .json, a row of a table, a caption of a .tar, or a whole
    .txt or .md file.

    The same input gives the same bytes, whatever the engine and the number of workers. A preparation that was stopped,
    killed or failed leaves no index behind; the same call resumes it.

    Args:
        sources: Text files (.txt, .md, .jsonl, .json, .csv, .tsv, also with .gz, .zst, .bz2 or .xz; .parquet, .arrow),
            .tar of captioned images, folders or URLs of them, builtin:prose or builtin:code.
        tokenizer: Folder with a ``tokenizer.json`` (or ``tokenizer.model``, or ``vocab.json`` and ``merges.txt``), or
            hub name of a fast tokenizer.
        out: Folder or URL to write, new or empty; every machine of a cluster has to see it.
        sequence_length: Number of predicted tokens per row.
        held_out: Share of the documents kept for validation, in [0, 1).
        workers: Number of worker processes (default: 1; with ray: all there is room for).
        text_field: Field of .jsonl and .json, or column of a table, with the text; raw.text is a field in a field.
        document_separator: Text between the documents of a .txt or .md file, in which backslash n is a line end, or
            blank-line (default: a file is one document).
        max_corrupt: Share of the documents, and of the bytes in damaged files, that may be lost; they are skipped,
            counted and the first ones named.
        max_unknown: Share of the text that the tokenizer may not know.
        rows_per_shard: Number of rows per shard (default: shards of about 256 MiB).
        overwrite: Replace what an earlier preparation left in ``out``.
        engine: Engine that runs the work: worker processes here, or the machines of a Ray cluster.
        ray_address: Address of the Ray cluster (default: RAY_ADDRESS, or a cluster that is started here).
        progress: Whether to show progress bars on stderr.
        end_token: Token after each document, as text (default: the tokenizer's end token, or, if that ends the turns
            of a chat, the token that ends documents).
        prompt_field: Field of .jsonl and .json with a prompt: the document begins with it, and its tokens are read
            but not predicted.

    Returns:
        The index of each side: ``train``, and ``val`` where something is held out.

    Raises:
        UsageError: Arguments out of range, sources or a tokenizer that cannot be read, too little text for one row, an
            ``out`` that is not empty, a full disk.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is {held_out}, expected a share of the documents from 0 to below 1")
    for name, share in (("max_corrupt", max_corrupt), ("max_unknown", max_unknown)):
        if not 0 <= share <= 1:
            raise UsageError(f"{name} is {share}, expected a share from 0 to 1")
    skipped = Skipped(max_corrupt)
    with open_engine(engine, workers, ray_address) as pool:
        files, read_tokenizer = expand(sources, skipped), load_tokenizer(tokenizer, end_token)
        separator = _separator(document_separator, files)
        sides = ("train", "val") if held_out else ("train",)
        layout = RowLayout(
            name=shard_name(sources[0], otherwise="text"),
            sequence_length=sequence_length,
            vocab_size=read_tokenizer.vocab_size,
            end_token=read_tokenizer.end_token,
            tokenizer_sha256=read_tokenizer.sha256,
            sources=tuple(sources),
            rows_per_shard=rows_per_shard,
            begin_tokens=read_tokenizer.begin_tokens,
            masks=prompt_field is not None,
        )
        target = Target.for_engine(engine, out)
        job = TextJob(
            target,
            layout,
            sides,
            held_out,
            text_field,
            read_tokenizer.json,
            separator,
            max_corrupt,
            max_unknown,
            prompt_field,
        )
        plan = {
            "held_out": held_out,
            "text_field": text_field,
            "document_separator": separator,
            "prompt_field": prompt_field,
        }
        begin(target, {**vars(layout), **plan}, CORPUS_LAYOUT, overwrite)
        if engine == "ray":
            files = [file if file.kind == "builtin" else replace(file, name=everywhere(file.name)) for file in files]
        indices = prepare_text_units(files, read_tokenizer, job, skipped, pool, progress)
    begin_text = f", begin tokens {list(layout.begin_tokens)}" if layout.begin_tokens else ", no begin token"
    print(f"end token {read_tokenizer.end_text!r} ({layout.end_token}){begin_text}", file=sys.stderr)
    for side in sides:
        print(_summary(join(str(out), side), indices[side]), file=sys.stderr)
    if report := skipped.report():
        print(report, file=sys.stderr)
    return indices


def _separator(given: str | None, files: Sequence[SourceFile]) -> str | None:
    """Return the separator of documents, with its escapes replaced."""
    if given is None:
        return None
    if not any(file.kind in PLAIN_TEXT for file in files):
        raise UsageError(f"document_separator is {given!r}, but no source is a {' or '.join(PLAIN_TEXT)} file; omit it")
    separator = given.replace("\\n", "\n").replace("\\t", "\t")
    if not separator:
        raise UsageError("document_separator is empty, expected a text, or blank-line")
    return separator


def _summary(folder: str, index: TokenIndex) -> str:
    return (
        f"{folder}: {index.documents} documents, {index.tokens} tokens in {index.rows} rows of "
        f"{index.sequence_length}, {len(index.shards)} shards, {index.dropped_tokens} tokens of the tail dropped"
    )
