"""Whether a corpus folder still is what its index says: every byte is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from .. import UsageError
from ..datamodules.corpora.index import INDEX_FILE, Shard, read_index
from ..datamodules.corpora.open_shards import OpenShard
from ..datamodules.corpora.tar import scan, sha256_of
from ..datamodules.storage.random_access import is_remote
from .flat_tokens import verify_flat
from .formats import KINDS, Kind


def verify(folder: str | Path) -> list[str]:
    """Compare every shard of a corpus, or of the corpora in the folders of ``folder``, with its index.

    Sizes, SHA-256, sidecars against the tars' own headers, every row of tokens, the facts of every image, the copy of
    the tokenizer.

    Returns:
        One line a problem, none where all is well.

    Raises:
        UsageError: There is no corpus, or its index cannot be read.
    """
    local = not is_remote(str(folder))
    inside = sorted(path.parent for path in Path(folder).glob(f"*/{INDEX_FILE}")) if local else []
    if inside and not (Path(folder) / INDEX_FILE).exists():
        return [problem for corpus in inside for problem in verify(corpus)]
    where, content = read_index(folder)
    if content.get("kind") == "flat":
        return verify_flat(str(folder))
    if content.get("kind") not in KINDS:
        raise UsageError(f"{where}: kind is {content.get('kind')!r}, expected one of {', '.join(KINDS)}")
    kind = KINDS[content["kind"]]()
    index = kind.load(folder)
    problems, check_rows = _opened(kind, str(folder))
    first = 0
    for shard in index.shards:
        rows = range(first, first + shard.rows)
        problems += _shard_problems(str(folder), shard, kind, partial(check_rows, rows))
        first = rows.stop
    if local:
        listed = {name for shard in index.shards for name in (shard.name, shard.idx_name)}
        foreign = any(shard.url for shard in index.shards)
        for path in [] if foreign else sorted([*Path(folder).glob("*.tar"), *Path(folder).glob("*.idx")]):
            if path.name not in listed:
                problems.append(f"{path}: not listed in {INDEX_FILE}")
    return problems + kind.problems(str(folder), index)


def _opened(kind: Kind, folder: str) -> tuple[list[str], Callable[[range], None]]:
    """Return what is wrong with the files that rows need, and the check of rows, None if they cannot be read."""
    try:
        return [], partial(kind.check_rows, kind.open(folder))
    except UsageError as error:
        return [str(error)], lambda rows: None


def _shard_problems(folder: str, entry: Shard, kind: Kind, check_rows: Callable[[], None]) -> list[str]:
    try:
        shard = OpenShard(folder, entry)
    except UsageError as error:
        return [str(error)]
    problems = []
    sha256 = sha256_of(shard.content)
    if sha256 != shard.shard.sha256:
        problems.append(f"{shard.where}: SHA-256 is {sha256}, expected {shard.shard.sha256}; copy or prepare it again")
    for check in (partial(_check_offsets, shard, kind), check_rows):
        try:
            check()
        except UsageError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def _check_offsets(shard: OpenShard, kind: Kind) -> None:
    samples = list(scan(shard.content, shard.where))
    if len(samples) != shard.shard.samples:
        raise UsageError(f"{shard.where}: {len(samples)} samples found, {shard.shard.samples} expected")
    found = np.array([*(kind.offset(sample, shard.where) for sample in samples), samples[-1].end], dtype=np.uint64)
    wrong = np.flatnonzero(found != shard.offsets)
    if wrong.size:
        i = int(wrong[0])
        place = f"sample {i} begins" if i < len(samples) else "samples end"
        raise UsageError(f"{shard.idx}: says {place} at {shard.offsets[i]}, the tar says {found[i]}")
