"""Text to token shards on a cluster, in two stages of units; together they do what ``prepare`` does in one pass.

1. ``tokens``: a run of files becomes the tokens of either side. A file is never cut, so files bound what a unit takes.
2. ``shards``: once it is known how many tokens each run has, it is known which of them each shard holds.

The stream of a side is that of all files in their order, so that shards are those of the local engine, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ...datamodules.corpora.index import INDEX_FILE, Shard
from ...datamodules.corpora.tokens import TokenIndex
from ...datamodules.storage.random_access import open_bytes
from ...tokenizer_files import TokenizerFiles
from ..sources.documents import Skipped, SourceFile, identity
from ..steps.tokenizing import encode, start_worker, texts
from ..writing.destination import UNFINISHED, Target, everywhere
from ..writing.row_layout import MemberBuffer, RowLayout, token_key
from ..writing.shard_file import ShardFile
from .ray_tasks import Ray
from .resumable_units import READERS, Record, Stage, Unit, complete, digest_of, unit_bar

UNIT_BYTES = 2**26  # small files are done together, as each unit costs a task and some requests
READ_TOKENS = 2**22


@dataclass(frozen=True)
class TextJob:
    """What all units need.

    Args:
        target: Folder that is being filled.
        layout: Of the shards.
        sides: ``train``, and ``val`` where documents are held out.
        held_out: Share of the documents for ``val``.
        text_field: Field or column with the text.
        tokenizer_json: Contents of ``tokenizer.json``.
    """

    target: Target
    layout: RowLayout
    sides: tuple[str, ...]
    held_out: float
    text_field: str
    tokenizer_json: str


class Span(NamedTuple):
    """Tokens [begin, end) of the tokens of a run of files."""

    unit: str
    begin: int
    end: int


class ShardWork(NamedTuple):
    """A shard of a side: its number, and the spans that it packs."""

    side: str
    number: int
    spans: list[Span]


def tokenize(job: TextJob, unit: Unit) -> Record:
    """Tokens of a run of files into a file for each side; how many they are, and what was skipped."""
    start_worker()
    skipped = Skipped()
    tokens, documents = dict.fromkeys(job.sides, 0), dict.fromkeys(job.sides, 0)
    source = texts(unit.work, job.text_field, job.held_out, skipped)
    with job.target.scratch() as scratch, ExitStack() as stack:
        files = {side: stack.enter_context((scratch / side).open("wb")) for side in job.sides}
        for encoded in encode(source, job.tokenizer_json, job.layout.end_token, workers=1):
            side = job.sides[encoded.stream]
            job.layout.check(encoded.tokens)
            files[side].write(encoded.tokens.astype(job.layout.dtype).tobytes())
            tokens[side] += encoded.tokens.size
            documents[side] += encoded.documents
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())  # the record says that they are there
        for side in job.sides:
            if tokens[side]:
                job.target.publish(scratch / side, _tokens_file(unit.name, side))
    return {"tokens": tokens, "documents": documents, "skipped": asdict(skipped)}


def pack(job: TextJob, unit: Unit) -> Record:
    """A shard and its sidecar, from the tokens of runs of files; its entry in the index."""
    work: ShardWork = unit.work
    name = job.layout.shard_name(work.number)
    buffer, first = MemberBuffer(job.layout), work.number * job.layout.samples_per_shard
    with job.target.scratch() as scratch:
        file = ShardFile(scratch / name)
        try:
            for tokens in _read(job, work):
                for member in buffer.add(tokens):
                    file.add(token_key(first + file.samples), member)
            if (rest := buffer.rest()) is not None:
                file.add(token_key(first + file.samples), rest)
            shard = file.close()
        except BaseException:
            file.discard()
            raise
        for path in (file.path, file.path.with_suffix(".idx")):
            job.target.publish(path, f"{work.side}/{path.name}")
    return asdict(shard)


def prepare_text_units(
    files: Sequence[SourceFile],
    tokenizer: TokenizerFiles,
    job: TextJob,
    skipped: Skipped,
    ray: Ray,
    progress: bool,
) -> dict[str, TokenIndex]:
    """Fill a folder that :func:`.resumable_units.begin` has begun.

    Args:
        files: Sources in their order.
        tokenizer: Whose copy goes beside the shards.
        job: What all units need.
        skipped: Counts what is left out.
        ray: Who does the units.
        progress: Show progress bars on stderr.

    Returns:
        The index of each side.

    Raises:
        UsageError: Sources that cannot be read or have changed, too little text for one row.
    """
    runs = list(_runs([_everywhere(file) for file in files]))
    with unit_bar("tokenizing", len(runs), progress) as bar:
        records = complete(Stage(job.target, "tokens", tokenize, job), runs, ray, bar)
    for record in records:
        skipped.empty_documents += record["skipped"]["empty_documents"]
        skipped.repaired_documents += record["skipped"]["repaired_documents"]
    shards = [unit for side in job.sides for unit in _shards(job, side, runs, records)]
    with unit_bar("packing", len(shards), progress) as bar:
        packed = complete(Stage(job.target, "shards", pack, job), shards, ray, bar)
    for name, content in tokenizer.files.items():
        for side in job.sides:
            job.target.write(f"{side}/tokenizer/{name}", content)
    indices = {}
    for side in reversed(job.sides):
        entries = [Shard(**entry) for unit, entry in zip(shards, packed, strict=True) if unit.work.side == side]
        counts = ((record["tokens"][side], record["documents"][side]) for record in records)
        tokens, documents = map(sum, zip(*counts, strict=True))
        indices[side] = job.layout.index(tuple(entries), tokens, documents)
        job.target.write(f"{side}/{INDEX_FILE}", indices[side].content())
    job.target.remove(UNFINISHED)
    return {side: indices[side] for side in job.sides}


def _everywhere(file: SourceFile) -> SourceFile:
    return file if file.kind == "builtin" else replace(file, name=everywhere(file.name))


def _runs(files: Sequence[SourceFile]) -> Iterator[Unit]:
    """Neighbouring files of up to ``UNIT_BYTES`` together, and larger files alone."""
    with ThreadPoolExecutor(READERS) as pool:
        known = list(pool.map(identity, files))
    run: list[int] = []
    number = 0
    for i in range(len(files)):
        run.append(i)
        following = known[i + 1][1] if i + 1 < len(files) else UNIT_BYTES
        if sum(known[j][1] for j in run) + following > UNIT_BYTES or i + 1 == len(files):
            yield Unit(f"{number:06d}", digest_of([known[j] for j in run]), [files[j] for j in run])
            run, number = [], number + 1


def _shards(job: TextJob, side: str, runs: Sequence[Unit], records: Sequence[Record]) -> Iterator[Unit]:
    counts = np.array([record["tokens"][side] for record in records], dtype=np.int64)
    total = int(counts.sum())
    try:
        rows = job.layout.rows(total, job.target.where(side))
    except UsageError as error:
        raise UsageError(f"{error} (held_out is {job.held_out})" if job.held_out else str(error)) from None
    names, step = [unit.name for unit in runs], job.layout.tokens_per_shard
    for number, begin in enumerate(range(0, rows * job.layout.sequence_length, step)):
        # Neighbouring rows share a token, across shards too.
        found = spans(names, counts, begin, min(begin + step, rows * job.layout.sequence_length) + 1)
        yield Unit(f"{side}-{number:06d}", digest_of(found), ShardWork(side, number, found))


def spans(names: Sequence[str], counts: NDArray[np.int64], begin: int, end: int) -> list[Span]:
    """What of each run of files makes up tokens [begin, end) of a stream.

    Args:
        names: Of the runs.
        counts: Tokens of each, (runs,).
        begin: First token.
        end: After the last one.
    """
    ends = np.cumsum(counts)
    first, last = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, end, side="left")
    found = []
    for i in range(int(first), int(last) + 1):
        start = int(ends[i] - counts[i])
        if counts[i]:
            found.append(Span(names[i], max(begin - start, 0), min(end - start, int(counts[i]))))
    return found


def _read(job: TextJob, work: ShardWork) -> Iterator[NDArray[Any]]:
    size = job.layout.dtype.itemsize
    for span in work.spans:
        content = open_bytes(job.target.where(_tokens_file(span.unit, work.side)))
        for begin in range(span.begin, span.end, READ_TOKENS):
            end = min(begin + READ_TOKENS, span.end)
            yield np.frombuffer(content.read(begin * size, end * size), dtype=job.layout.dtype)
        content.close()


def _tokens_file(unit: str, side: str) -> str:
    return f"{UNFINISHED}/tokens/{unit}-{side}.tokens"
