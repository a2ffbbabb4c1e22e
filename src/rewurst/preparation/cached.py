"""Prepare text once for all runs, in a cache folder keyed by its content, its tokenizer and the rows' length.

A run that names its text finds what an earlier run prepared. A preparation that was interrupted resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import UsageError
from ..datamodules.corpora.index import INDEX_FILE
from ..datamodules.storage.random_access import is_remote
from ..files import writing
from ..tokenizer_files import load_tokenizer
from .engine.text_units import EmptySideError
from .sources.skipped import Skipped
from .sources.source_files import SourceFile, expand, identity, total_bytes
from .text import prepare_text

MOST_HELD_OUT = 0.5
MUCH_BYTES = 2**25
_BLOCK_BYTES = 2**20
_VERSION = 1  # of the bytes that a preparation writes


def cached_corpus(
    sources: Sequence[str],
    tokenizer: str,
    *,
    sequence_length: int,
    held_out: float,
    text_field: str = "text",
    document_separator: str | None = None,
    cache: Path,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Return the folder with the prepared text, after preparing it if no earlier run did.

    A small text may have no document that is held out; the share is then doubled until one is, up to one half.

    Args:
        sources: See :func:`.text.prepare_text`.
        tokenizer: Folder or hub name.
        sequence_length: Number of predicted tokens per row.
        held_out: Share of the documents for validation, in [0, 1).
        text_field: Field or column with the text.
        document_separator: What separates the documents of a plain text file.
        cache: Folder of all prepared texts.
        workers: Number of worker processes (default: one per core for much text, else one).
        progress: Whether to show progress bars on stderr.

    Returns:
        Folder with ``train`` and, with ``held_out`` above 0, ``val``.

    Raises:
        UsageError: See :func:`.text.prepare_text`.
    """
    options: dict[str, Any] = {
        "sequence_length": sequence_length,
        "text_field": text_field,
        "document_separator": document_separator,
    }
    key = _key(sources, tokenizer, {**options, "held_out": held_out})
    folder = cache / key
    if _is_complete(folder, held_out):
        return folder
    shares = [held_out]
    while held_out and shares[-1] < MOST_HELD_OUT:
        shares.append(min(2 * shares[-1], MOST_HELD_OUT))
    tried = []
    for share in shares:
        tried.append(folder.with_name(f"{key}-{_host()}-{share}"))
        try:
            prepare_text(
                sources,
                tokenizer,
                tried[-1],
                held_out=share,
                workers=workers or _workers(sources),
                progress=progress,
                **options,
            )
        except EmptySideError as error:
            if share == shares[-1] or error.side != "val" or error.documents < 2:
                raise
            print(f"{error}; trying held_out {min(2 * share, MOST_HELD_OUT)}", file=sys.stderr)
        else:
            break
    _publish(tried[-1], folder, held_out)
    for unfinished in tried[:-1]:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _workers(sources: Sequence[str]) -> int:
    """Return one worker per core for much text; starting them takes longer than preparing a little."""
    size = total_bytes(expand(sources, Skipped()))
    return len(os.sched_getaffinity(0)) if size >= MUCH_BYTES else 1


def _key(sources: Sequence[str], tokenizer: str, options: dict[str, Any]) -> str:
    files = [_content(file) for file in expand(sources, Skipped())]
    read = load_tokenizer(tokenizer)
    parts = [_VERSION, files, read.sha256, read.end_token, list(read.begin_tokens), options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _content(file: SourceFile) -> list[Any]:
    """Return what a file contains: a hash, the tag of a server, or the version of Python of a built-in corpus."""
    if file.kind == "builtin":
        return [file.name, sys.version]
    if is_remote(file.name):
        return [*identity(file)]
    digest = hashlib.blake2b(digest_size=16)
    try:
        with Path(file.name).open("rb") as content:
            while block := content.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise UsageError(f"source {file.name}: cannot be read ({error.strerror or error})") from None
    return [file.kind, Path(file.name).suffix, digest.hexdigest()]


def _is_complete(folder: Path, held_out: float) -> bool:
    return all((folder / side / INDEX_FILE).is_file() for side in (("train", "val") if held_out else ("train",)))


def _host() -> str:
    """Return the name of this machine: each prepares by itself where several share a cache folder."""
    return hashlib.blake2b(os.uname().nodename.encode(), digest_size=4).hexdigest()


def _publish(unfinished: Path, folder: Path, held_out: float) -> None:
    with writing(folder):
        try:
            os.replace(unfinished, folder)
        except OSError:
            if not _is_complete(folder, held_out):  # else another machine was faster
                raise
            shutil.rmtree(unfinished, ignore_errors=True)
