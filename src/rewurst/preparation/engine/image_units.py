"""Turn captioned pictures into shards, in two stages of units.

1. ``pictures``: a run of pictures becomes samples in a tar for each side, with their facts.
2. ``shards``: the sizes of all samples decide which of them each shard contains.

The samples of a side are those of all pictures in their order, so that the engine does not change a byte.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...datamodules.corpora.images import sample_members
from ...datamodules.corpora.index import INDEX_FILE, Shard
from ...datamodules.corpora.open_shards import OpenShard
from ...datamodules.imaging.facts import FACTS_DTYPE, facts_array
from ..sources.pictures import Listing, Picture
from ..steps.recoding import Fault, Faults, Recoding, sample_of, side_of, without_caption
from ..writing.destination import UNFINISHED, Target
from ..writing.image_index import image_index
from ..writing.image_writer import ImageSample, image_key, image_shard_name, is_full, no_picture
from ..writing.shard_file import ShardFile
from .resumable_units import Engine, Record, Stage, Unit, complete, digest_of, finish, progress_bar

UNIT_PICTURES = 256


@dataclass(frozen=True)
class ImageJob:
    """Settings that all units share.

    Args:
        target: Folder that is being filled.
        name: Prefix of the shards' names.
        sides: ``train`` and others.
        held_out: Share of the pictures for ``val``.
        recoding: How pictures are stored.
        samples_per_shard: Samples in a shard (default: shards of about 256 MiB).
        skip_without_caption: Whether a picture without a caption is left out; otherwise it is an error.
    """

    target: Target
    name: str
    sides: tuple[str, ...]
    held_out: float
    recoding: Recoding
    samples_per_shard: int | None
    skip_without_caption: bool

    def plan(self) -> dict[str, Any]:
        """Return everything that decides the bytes."""
        asked = {"held_out": self.held_out, "samples_per_shard": self.samples_per_shard}
        return asked | asdict(self.recoding)


class Span(NamedTuple):
    """Samples [begin, end) of the tar that a run of pictures made for a side, and its entry as of an index."""

    entry: dict[str, Any]
    begin: int
    end: int


class ShardWork(NamedTuple):
    """A shard of a side: its number, that of its first sample, and the spans that it packs."""

    side: str
    number: int
    first: int
    spans: list[Span]


def gather(job: ImageJob, unit: Unit) -> Record:
    """Write the samples of a run of pictures into a tar for each side.

    The record has ``seen``, ``faults`` (pictures that cannot be used), ``several`` (the number of pictures with several
    captions) and, for each side that has samples, ``entry``, ``facts`` and ``ends``, the offsets after each sample.
    """
    files, samples, faults, several = dict[str, ShardFile](), dict[str, list[ImageSample]](), list[Fault](), 0
    with job.target.scratch() as scratch, ExitStack() as stack:
        for picture in unit.work:
            result = sample_of(picture, job.recoding)
            if isinstance(result, Fault):
                if result.kind == "caption" and not job.skip_without_caption:
                    raise without_caption(result)
                faults.append(result)
                continue
            several += b"\n" in result.members["txt"]
            side = side_of(result, job.held_out)
            if side not in files:
                files[side] = stack.enter_context(ShardFile(scratch / f"{unit.name}-{side}.tar"))
                samples[side] = []
            files[side].add_members(image_key(files[side].samples), result.members)
            samples[side].append(result._replace(members={}))
        sides = {side: _publish(job, files[side], samples[side]) for side in files}
    return {"seen": len(unit.work), "faults": faults, "several": several, "sides": sides}


def _publish(job: ImageJob, file: ShardFile, samples: Sequence[ImageSample]) -> Record:
    entry = file.close()
    ends = np.fromfile(file.path.with_suffix(".idx"), dtype="<u8")[1:]
    for path in (file.path, file.path.with_suffix(".idx")):
        job.target.publish(path, f"{_PARTS}/{path.name}")
    facts = facts_array([sample.facts for sample in samples])
    return {"entry": asdict(entry), "facts": _text(facts), "ends": _text(ends)}


def pack(job: ImageJob, unit: Unit) -> Record:
    """Write a shard and its sidecar from the samples of runs of pictures; record its entry in the index."""
    work: ShardWork = unit.work
    name = image_shard_name(job.name, work.number)
    with job.target.scratch() as scratch, ShardFile(scratch / name) as file:
        for number, members in enumerate(_members(job, work.spans), work.first):
            file.add_members(image_key(number), members)
        shard = file.close()
        for path in (file.path, file.path.with_suffix(".idx")):
            job.target.publish(path, f"{work.side}/{path.name}")
    return asdict(shard)


def _members(job: ImageJob, spans: Iterable[Span]) -> Iterator[dict[str, bytes]]:
    for span in spans:
        part = OpenShard(job.target.where(_PARTS), Shard(**span.entry))
        for number in range(span.begin, span.end):
            yield sample_members(bytes(part.sample(number)), part.where)
        part.content.close()


def prepare_image_units(
    listed: Listing, sources: Sequence[str], job: ImageJob, max_corrupt: float, engine: Engine, progress: bool
) -> tuple[dict[str, tuple[int, int]], Faults]:
    """Fill a folder that :func:`.resumable_units.begin` has made.

    Args:
        listed: Pictures in their order.
        sources: Sources to record in the index.
        job: What all units share.
        max_corrupt: Share of the pictures that may be corrupt.
        engine: Engine that runs the units.
        progress: Show progress bars on stderr.

    Returns:
        Samples and shards of each side, and the pictures that could not be used.

    Raises:
        UsageError: A source has changed, too many pictures cannot be used, or a side has none.
    """
    early, counted = (Faults(max_corrupt, job.skip_without_caption) for _ in range(2))
    stage = Stage(job.target, "pictures", gather, job)
    with progress_bar("images", "pictures", listed.total, progress) as bar:
        runs = _runs(listed.pictures)
        found = complete(stage, runs, engine, bar, lambda done: done["seen"], lambda done: _count(early, done))
    records = list(found.values())
    for record in records:
        _count(counted, record)
        counted.several += record.get("several", 0)
    counted.count(0, [], final=True)
    shards = [unit for side in job.sides for unit in _shards(job, side, records)]
    with progress_bar("packing", "shards", len(shards), progress) as bar:
        packed = complete(Stage(job.target, "shards", pack, job), shards, engine, bar)
    counts = {}
    for side in reversed(job.sides):
        entries = [Shard(**packed[unit.name]) for unit in shards if unit.work.side == side]
        facts = [_array(record["sides"][side]["facts"], FACTS_DTYPE) for record in records if side in record["sides"]]
        index = image_index(job.target.where(side), entries, facts, sources)
        job.target.write(f"{side}/{INDEX_FILE}", index.content())
        counts[side] = index.rows, len(entries)
    finish(job.target, ("pictures", "shards"))
    return counts, counted


def _count(faults: Faults, record: Record) -> None:
    faults.count(record["seen"], [Fault(*fault) for fault in record["faults"]])


def _runs(pictures: Iterable[Picture]) -> Iterator[Unit]:
    listed = iter(pictures)
    for number in itertools.count():
        run = list(itertools.islice(listed, UNIT_PICTURES))
        if not run:
            return
        yield Unit(f"{number:06d}", digest_of([_identity(picture) for picture in run]), run)


def _identity(picture: Picture) -> list[Any]:
    """Return the name of a picture, and what changes when one of its files on this machine does."""
    known: list[Any] = [picture.name, *(() if picture.caption else picture.caption_fields)]
    for part in (picture.image, picture.caption, picture.values):
        if part and isinstance(part, dict | list):
            known.append(digest_of(part))
        elif isinstance(part, Path):
            with suppress(OSError):  # a missing file is for the worker to report
                status = part.stat()
                known += [status.st_size, status.st_mtime_ns]
        elif isinstance(part, bytes):
            known.append(hashlib.sha256(part).hexdigest())
        elif isinstance(part, str):
            known.append(part)
    return known


def _shards(job: ImageJob, side: str, records: Sequence[Record]) -> Iterator[Unit]:
    parts = [record["sides"][side] for record in records if side in record["sides"]]
    first = 0
    for number, found in enumerate(_cut([(part["entry"], part["ends"]) for part in parts], job.samples_per_shard)):
        yield Unit(f"{side}-{number:06d}", digest_of(found), ShardWork(side, number, first, found))
        first += sum(span.end - span.begin for span in found)
    if not first:
        raise no_picture(job.target.where(side))


def _cut(parts: Iterable[tuple[dict[str, Any], str]], samples_per_shard: int | None) -> Iterator[list[Span]]:
    """Yield the spans of each shard."""
    found, samples, size = list[Span](), 0, 0
    for entry, ends in parts:
        begin = 0
        sizes = np.diff(_array(ends, np.dtype("<u8")).astype(np.int64), prepend=0).tolist()
        for i in range(len(sizes)):
            samples, size = samples + 1, size + sizes[i]
            if is_full(samples, size, samples_per_shard):
                yield [*found, Span(entry, begin, i + 1)]
                found, samples, size, begin = [], 0, 0, i + 1
        if begin < len(sizes):
            found.append(Span(entry, begin, len(sizes)))
    if found:
        yield found


def _text(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


_PARTS = f"{UNFINISHED}/pictures"
