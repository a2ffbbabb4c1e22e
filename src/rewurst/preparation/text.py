"""Sources to token shards, for training and for validation.

1. ``sources`` gives pieces of documents in one fixed order.
2. A hash of the document's beginning says whether it is held out: equal documents are on the same side.
3. ``steps.tokenizing`` turns them into tokens in worker processes, an end token after each document.
4. One ordered pass packs the tokens of either side into rows and shards (``writing.token_writer``).

On a Ray cluster ``cluster.text_units`` does steps 1 to 3 for runs of files, and step 4 for each shard.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .. import UsageError
from ..datamodules.corpora.tokens import TokenIndex
from ..datamodules.storage.random_access import join
from ..tokenizer_files import TokenizerFiles, load_tokenizer
from .cluster.ray_tasks import Ray, check_engine
from .cluster.resumable_units import begin
from .cluster.text_units import TextJob, prepare_text_units
from .sources.documents import Skipped, expand
from .steps.tokenizing import Text, encode, is_held_out, texts
from .tokenizer import train_tokenizer
from .verify import verify
from .writing.destination import Target, local_out
from .writing.folders import CORPUS_LAYOUT, make_folder, shard_name
from .writing.row_layout import RowLayout
from .writing.token_writer import TokenWriter

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
    rows_per_shard: int | None = None,
    overwrite: bool = False,
    engine: str = "local",
    ray_address: str | None = None,
    progress: bool = True,
) -> dict[str, TokenIndex]:
    """Tokenize sources into ``out/train`` and, with ``held_out`` above 0, ``out/val``.

    The same input gives the same bytes, whatever the engine and the number of workers. When it fails, no index is left
    behind. Asked for again, engine ``ray`` goes on where it was stopped.

    Args:
        sources: Files, folders, URLs of either and built-in corpora (see ``sources.expand``).
        tokenizer: Folder with a ``tokenizer.json``, or hub name.
        out: Folder, empty or new; with engine ``ray`` every machine sees it, and it may be a URL.
        sequence_length: Predicted tokens a row.
        held_out: Share of the documents for validation, in [0, 1).
        workers: Processes that tokenize, by default this one alone; with engine ``ray`` at most so many at once.
        text_field: Field of JSON lines, column of Parquet files.
        rows_per_shard: By default shards have about 256 MiB.
        overwrite: Replace what an earlier preparation left in ``out``.
        engine: ``local``, or ``ray`` for the machines of a Ray cluster.
        ray_address: Of the cluster, see :class:`.cluster.ray_tasks.Ray`.
        progress: Show a progress bar on stderr.

    Returns:
        The index of each side: ``train``, and ``val`` where something is held out.

    Raises:
        UsageError: Arguments out of range, sources or a tokenizer that cannot be read, too little text for one row, an
            ``out`` that is not empty, a full disk.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is {held_out}, expected a share of the documents from 0 to below 1")
    if workers is not None and workers < 0:
        raise UsageError(f"workers is {workers}, expected 0 or more")
    check_engine(engine, ray_address)
    skipped = Skipped()
    files, read_tokenizer = expand(sources, skipped), load_tokenizer(tokenizer)
    sides = ("train", "val") if held_out else ("train",)
    layout = RowLayout(
        name=shard_name(sources[0], otherwise="text"),
        sequence_length=sequence_length,
        vocab_size=read_tokenizer.vocab_size,
        end_token=read_tokenizer.end_token,
        tokenizer_sha256=read_tokenizer.sha256,
        sources=tuple(sources),
        rows_per_shard=rows_per_shard,
    )
    if engine == "ray":
        job = TextJob(Target.shared(out), layout, sides, held_out, text_field, read_tokenizer.json)
        with Ray(ray_address, workers) as ray:
            begin(
                job.target, {**vars(layout), "held_out": held_out, "text_field": text_field}, CORPUS_LAYOUT, overwrite
            )
            indices = prepare_text_units(files, read_tokenizer, job, skipped, ray, progress)
    else:
        texts_read = texts(files, text_field, held_out, skipped)
        make_folder(local_out(out), CORPUS_LAYOUT, overwrite)
        writers = {side: TokenWriter.with_layout(local_out(out) / side, layout) for side in sides}
        indices = _prepare_here(writers, texts_read, read_tokenizer, workers or 1, held_out, progress)
    for side in sides:
        print(_summary(join(str(out), side), indices[side]), file=sys.stderr)
    if report := skipped.report():
        print(report, file=sys.stderr)
    return {side: indices[side] for side in sides}


def _prepare_here(
    writers: dict[str, TokenWriter],
    texts: Iterator[Text],
    tokenizer: TokenizerFiles,
    workers: int,
    held_out: float,
    progress: bool,
) -> dict[str, TokenIndex]:
    try:
        _write(list(writers.values()), texts, tokenizer, workers, progress)
        for writer in writers.values():
            tokenizer.save(writer.folder / "tokenizer")
        # The held-out side first: it is the one that may be too small, and whole corpora have an index.
        return {side: _close(writers[side], held_out) for side in reversed(writers)}
    except BaseException:
        for writer in writers.values():
            writer.abort()
            shutil.rmtree(writer.folder, ignore_errors=True)  # it did not exist, so all in it is ours
        raise


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


def _summary(folder: str, index: TokenIndex) -> str:
    return (
        f"{folder}: {index.documents} documents, {index.tokens} tokens in {index.rows} rows of "
        f"{index.sequence_length}, {len(index.shards)} shards, {index.dropped_tokens} tokens of the tail dropped"
    )
