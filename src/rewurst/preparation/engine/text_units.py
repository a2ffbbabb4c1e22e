"""Turn text into token shards, in two stages of units.

1. ``tokens``: a part of the text becomes the tokens of each side. On this machine one process reads the files and cuts
   them into parts, so that a single file keeps all workers busy. On a cluster a part is a run of whole files, which
   the worker reads itself.
2. ``shards``: the number of tokens of every part decides which of them each shard contains.

The stream of a side is that of all files in their order, so that neither the parts nor the engine changes a byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ...datamodules.corpora.index import INDEX_FILE, Shard
from ...datamodules.corpora.tokens import TokenIndex
from ...datamodules.storage.random_access import open_bytes
from ...files import writing
from ...tokenizer_files import TokenizerFiles
from ..sources.skipped import Skipped
from ..sources.source_files import SourceFile, identity
from ..steps.sections import Text
from ..steps.tokenizing import Encoder, encode, encoder_of, texts
from ..writing.destination import UNFINISHED, Target
from ..writing.row_layout import MemberBuffer, RowLayout, token_key
from ..writing.shard_file import ShardFile
from .local_pool import LocalPool
from .resumable_units import READERS, Engine, Record, Stage, Unit, complete, digest_of, finish, progress_bar
from .tally import Tally, tokens_of

RUN_BYTES = 2**26  # small files are read together, because each unit costs a task and some requests
PART_CHARS = 2**22  # of a part that one process cuts for others: much work per task, little lost by a kill
READ_TOKENS = 2**22
Counts = dict[str, Any]


@dataclass(frozen=True)
class TextJob:
    """Settings that all units share.

    Args:
        target: Folder that is being filled.
        layout: Layout of the shards.
        sides: ``train``, and ``val`` if documents are held out.
        held_out: Share of the documents for ``val``.
        text_field: Field or column with the text.
        tokenizer_json: Contents of ``tokenizer.json``.
        separator: What separates the documents of a plain text file (default: the file is one document).
        max_corrupt: Share of the documents that may be corrupt.
        max_unknown: Share of the text that the tokenizer may not know.
        prompt_field: Field with the beginning of the document that is not to be predicted.
    """

    target: Target
    layout: RowLayout
    sides: tuple[str, ...]
    held_out: float
    text_field: str
    tokenizer_json: str
    separator: str | None = None
    max_corrupt: float = 0.0
    max_unknown: float = 1.0
    prompt_field: str | None = None

    @property
    def encoder(self) -> Encoder:
        """Encoder of this process."""
        return encoder_of(self.tokenizer_json, self.layout.end_token, self.layout.begin_tokens)

    def texts(self, files: Sequence[SourceFile], skipped: Skipped) -> Iterator[Text]:
        """Yield the documents of files."""
        return texts(files, self.text_field, self.held_out, skipped, self.encoder, self.separator, self.prompt_field)


class EmptySideError(UsageError):
    """No document, or too little text, for one of the sides.

    Args:
        message: What is wrong.
        side: Side that is empty.
        documents: Number of documents on all sides.
    """

    def __init__(self, message: str, side: str, documents: int) -> None:
        super().__init__(message)
        self.side, self.documents = side, documents


class Cut(NamedTuple):
    """Texts that another process has read, and how many documents it skipped while it read them."""

    texts: list[Text]
    skipped: Counts


class Span(NamedTuple):
    """Tokens [begin, end) of a part."""

    part: str
    begin: int
    end: int


class ShardWork(NamedTuple):
    """A shard of a side: its number, and the spans that it packs."""

    side: str
    number: int
    spans: list[Span]


def tokenize(job: TextJob, unit: Unit) -> Record:
    """Write the tokens of a part into a file for each side; record their numbers and what was skipped.

    The unit's work is a :class:`Cut`, or the list of the files to read.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism
    skipped = Skipped(job.max_corrupt)
    cut = unit.work if isinstance(unit.work, Cut) else None
    source = iter(cut.texts) if cut else job.texts(unit.work, skipped)
    tokens, documents = dict.fromkeys(job.sides, 0), dict.fromkeys(job.sides, 0)
    unknown, first = 0, ""
    with job.target.scratch() as scratch, writing(scratch), ExitStack() as stack:
        files = {side: stack.enter_context((scratch / side).open("wb")) for side in job.sides}
        for encoded in encode(source, job.encoder):
            side = job.sides[encoded.stream]
            job.layout.check(encoded.tokens)
            files[side].write(encoded.tokens.astype(job.layout.stream_dtype).tobytes())
            tokens[side] += encoded.tokens.size
            documents[side] += encoded.documents
            unknown, first = unknown + encoded.unknown, first or encoded.first_unknown
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())  # the record says that they are there
        for side in job.sides:
            if tokens[side]:
                job.target.publish(scratch / side, _tokens_file(unit.name, side))
    counts = cut.skipped if cut else skipped.take()
    return {"tokens": tokens, "documents": documents, "skipped": counts, "unknown": [unknown, first]}


def pack(job: TextJob, unit: Unit) -> Record:
    """Write a shard and its sidecar from the tokens of parts; record its entry in the index."""
    work: ShardWork = unit.work
    name = job.layout.shard_name(work.number)
    buffer, first = MemberBuffer(job.layout), work.number * job.layout.samples_per_shard
    with job.target.scratch() as scratch, ShardFile(scratch / name) as file:
        for tokens in _read(job, work):
            for member in buffer.add(tokens):
                file.add(token_key(first + file.samples), *job.layout.split(member))
        if (rest := buffer.rest()) is not None:
            file.add(token_key(first + file.samples), *job.layout.split(rest))
        shard = file.close()
        for path in (file.path, file.path.with_suffix(".idx")):
            job.target.publish(path, f"{work.side}/{path.name}")
    return asdict(shard)


def prepare_text_units(
    files: Sequence[SourceFile],
    tokenizer: TokenizerFiles,
    job: TextJob,
    skipped: Skipped,
    engine: Engine,
    progress: bool,
) -> dict[str, TokenIndex]:
    """Fill a folder that :func:`.resumable_units.begin` has made.

    Args:
        files: Sources in their order.
        tokenizer: Tokenizer to copy next to the shards.
        job: What all units share.
        skipped: Counter of skipped documents.
        engine: Engine that runs the units.
        progress: Show progress bars on stderr.

    Returns:
        The index of each side.

    Raises:
        UsageError: A source cannot be read or has changed, or there is too little text for one row.
    """
    stage = Stage(job.target, "tokens", tokenize, job)
    with ThreadPoolExecutor(READERS) as pool:
        known = list(pool.map(identity, files))
    runs = _runs(files, known)
    parts = _cut(job, runs, stage.done()) if isinstance(engine, LocalPool) else runs
    records = _tokenized(stage, parts, job, skipped, sum(size for _, size, _ in known), engine, progress)
    shards = [unit for side in job.sides for unit in _shards(job, side, records)]
    with progress_bar("packing", "shards", len(shards), progress) as bar:
        packed = complete(Stage(job.target, "shards", pack, job), shards, engine, bar)
    for name, content in tokenizer.files.items():
        for side in job.sides:
            job.target.write(f"{side}/tokenizer/{name}", content)
    indices = {}
    for side in reversed(job.sides):
        entries = [Shard(**packed[unit.name]) for unit in shards if unit.work.side == side]
        counts = ((record["tokens"][side], record["documents"][side]) for record in records.values())
        tokens, documents = map(sum, zip(*counts, strict=True))
        indices[side] = job.layout.index(tuple(entries), tokens, documents)
        job.target.write(f"{side}/{INDEX_FILE}", indices[side].content())
    finish(job.target, ("tokens", "parts", "shards"))
    return {side: indices[side] for side in job.sides}


def _tokenized(
    stage: Stage[TextJob],
    parts: Iterable[Unit],
    job: TextJob,
    skipped: Skipped,
    size: int,
    engine: Engine,
    progress: bool,
) -> dict[str, Record]:
    """Do the first stage, and raise if too much is lost; where nothing was found, no record stays."""
    early, fresh = Tally(Skipped(job.max_corrupt), size, job.max_unknown), not stage.done()
    try:
        with progress_bar("tokenizing", "tokens", None, progress) as bar:
            records = complete(stage, parts, engine, bar, tokens_of, early.add)
        whole = Tally(skipped, size, job.max_unknown)  # in the order of the files, for the first of each kind
        for record in records.values():
            whole.add(record)
        whole.finish()
    except UsageError:
        if fresh and not early.tokens:  # so that the same command with another text_field starts over
            for folder in (stage.name, "parts"):
                job.target.remove(f"{UNFINISHED}/{folder}")
        raise
    return records


def _runs(files: Sequence[SourceFile], known: Sequence[tuple[str, int, str]]) -> Iterator[Unit]:
    """Group neighbouring files of up to ``RUN_BYTES`` together; larger files stand alone."""
    run: list[int] = []
    number = 0
    for i in range(len(files)):
        run.append(i)
        following = known[i + 1][1] if i + 1 < len(files) else RUN_BYTES
        if sum(known[j][1] for j in run) + following > RUN_BYTES or i + 1 == len(files):
            yield Unit(f"{number:06d}", digest_of([known[j] for j in run]), [files[j] for j in run])
            run, number = [], number + 1


def _cut(job: TextJob, runs: Iterable[Unit], done: Mapping[str, str]) -> Iterator[Unit]:
    """Cut runs of files into parts of about ``PART_CHARS`` characters.

    A run whose parts are listed and all done is not read again.
    """
    for run in runs:
        listing = f"{UNFINISHED}/parts/{run.name}.{run.digest}.json"
        known: list[list[str]] | None = json.loads(job.target.read(listing) or "null")
        if known and all(done.get(name) == digest for name, digest in known):
            yield from (Unit(name, digest, None) for name, digest in known)
            continue
        parts = []
        for number, cut in enumerate(_parts(job, run.work)):
            parts.append(Unit(f"{run.name}-{number:06d}", digest_of(cut.texts), cut))
            yield parts[-1]
            parts[-1] = parts[-1]._replace(work=None)
        job.target.write(listing, json.dumps([[part.name, part.digest] for part in parts]))


def _parts(job: TextJob, files: Sequence[SourceFile]) -> Iterator[Cut]:
    """Read files into parts; the last one, which counts what was skipped at the end, may have no text."""
    skipped, part, size = Skipped(job.max_corrupt), list[Text](), 0
    for text in job.texts(files, skipped):
        part.append(text)
        size += len(text.text) + 64  # a million empty lines are work too
        if size >= PART_CHARS:
            yield Cut(part, skipped.take())
            part, size = [], 0
    yield Cut(part, skipped.take())


def _shards(job: TextJob, side: str, records: Mapping[str, Record]) -> Iterator[Unit]:
    counts = np.array([record["tokens"][side] for record in records.values()], dtype=np.int64)
    total = int(counts.sum())
    documents = {side: sum(record["documents"][side] for record in records.values()) for side in job.sides}
    there = sum(documents.values())
    if not documents[side] and there:
        raise EmptySideError(
            f"{job.target.where(side)}: none of the {there} documents is here with held_out {job.held_out}; a plain "
            "text file is one document unless --document_separator says what separates its documents: give more "
            "documents or another share",
            side,
            there,
        )
    try:
        rows = job.layout.rows(total, job.target.where(side))
    except UsageError as error:
        if job.held_out:
            raise EmptySideError(f"{error} (held_out is {job.held_out})", side, there) from None
        raise
    step = job.layout.tokens_per_shard
    for number, begin in enumerate(range(0, rows * job.layout.sequence_length, step)):
        # Neighbouring rows share a token, across shards too.
        found = spans(list(records), counts, begin, min(begin + step, rows * job.layout.sequence_length) + 1)
        yield Unit(f"{side}-{number:06d}", digest_of(found), ShardWork(side, number, found))


def spans(names: Sequence[str], counts: NDArray[np.int64], begin: int, end: int) -> list[Span]:
    """Return the spans of the parts that make up tokens [begin, end) of a stream.

    Args:
        names: Names of the parts.
        counts: Number of tokens of each part, (parts,).
        begin: First token.
        end: Token after the last one.
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
    size = job.layout.stream_dtype.itemsize
    for span in work.spans:
        content = open_bytes(job.target.where(_tokens_file(span.part, work.side)))
        for begin in range(span.begin, span.end, READ_TOKENS):
            end = min(begin + READ_TOKENS, span.end)
            yield np.frombuffer(content.read(begin * size, end * size), dtype=job.layout.stream_dtype)
        content.close()


def _tokens_file(part: str, side: str) -> str:
    return f"{UNFINISHED}/tokens/{part}-{side}.tokens"
