"""Whether a corpus folder still is what its index says: every byte is read."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np

from .. import UsageError
from .corpus_index import INDEX_FILE, CorpusIndex, Shard
from .shards import MappedShard


def verify(folder: str | Path) -> list[str]:
    """Compare every shard of a corpus, or of the corpora in the folders of ``folder``, with its index.

    Sizes, SHA-256, sidecars against the tars' own headers, each member's shape and type, the copy of the tokenizer.

    Returns:
        One line a problem, none where all is well.

    Raises:
        UsageError: There is no corpus, or its index cannot be read.
    """
    folder = Path(folder)
    inside = sorted(path.parent for path in folder.glob(f"*/{INDEX_FILE}"))
    if inside and not (folder / INDEX_FILE).exists():
        return [problem for corpus in inside for problem in verify(corpus)]
    index = CorpusIndex.load(folder)
    problems, first_row = [], 0
    for shard in index.shards:
        problems += _shard_problems(folder, index, shard, first_row)
        first_row += shard.rows
    listed = {name for shard in index.shards for name in (shard.name, shard.idx_name)}
    for path in sorted([*folder.glob("*.tar"), *folder.glob("*.idx")]):
        if path.name not in listed:
            problems.append(f"{path}: not listed in {INDEX_FILE}")
    return problems + _tokenizer_problems(folder, index)


def _shard_problems(folder: Path, index: CorpusIndex, shard: Shard, first_row: int) -> list[str]:
    try:
        mapped = MappedShard(folder, index, shard, first_row)
    except UsageError as error:
        return [str(error)]
    problems = []
    sha256 = file_sha256(mapped.path)
    if sha256 != shard.sha256:
        problems.append(f"{mapped.path}: SHA-256 is {sha256}, expected {shard.sha256}; copy or prepare it again")
    try:
        problems += _offset_problems(mapped)
        for sample in range(shard.samples):
            mapped.member(sample)
    except UsageError as error:
        problems.append(str(error))
    return problems


def _offset_problems(mapped: MappedShard) -> list[str]:
    try:
        with tarfile.open(mapped.path, "r:") as tar:
            found = [member.offset for member in tar]
            end = tar.offset
    except tarfile.TarError as error:
        return [f"{mapped.path}: not a readable tar ({error})"]
    found.append(end)
    if len(found) != len(mapped.offsets):
        return [f"{mapped.path}: {len(found) - 1} members found, {len(mapped.offsets) - 1} expected"]
    wrong = np.flatnonzero(np.array(found, dtype=np.uint64) != mapped.offsets)
    if wrong.size:
        i = int(wrong[0])
        place = f"member {i} begins" if i < len(found) - 1 else "members end"
        return [f"{mapped.path.with_suffix('.idx')}: says {place} at {mapped.offsets[i]}, the tar says {found[i]}"]
    return []


def _tokenizer_problems(folder: Path, index: CorpusIndex) -> list[str]:
    path = folder / "tokenizer" / "tokenizer.json"
    if not index.tokenizer_sha256 and not path.exists():
        return []
    if not path.exists():
        return [f"{path}: missing; the copy of the tokenizer belongs to the corpus"]
    sha256 = file_sha256(path)
    if sha256 != index.tokenizer_sha256:
        return [f"{path}: SHA-256 is {sha256}, expected {index.tokenizer_sha256}; the tokens were made by another one"]
    return []


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
