"""An index for shards that others wrote: one scan over each tar, which is left as it is.

1. Tars are named by path, glob, braces (``shard-{000000..000009}.tar``), folder or URL; their order is the stream's.
2. Each is scanned by itself, in as many processes as asked for: which bytes make which sample, a hash of all bytes, and
   what the kind of corpus needs (the shape and range of token rows, the facts of images).
3. Sidecars and ``index.json`` are written next to the tars, or into a folder of their own.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import UsageError
from ..datamodules.corpora.index import INDEX_FILE, Shard
from ..datamodules.corpora.tar import Sample, scan, sha256_of
from ..datamodules.storage.random_access import is_remote, open_bytes
from ..files import write_atomically, writing
from .engine.local_pool import LocalPool
from .formats import KINDS, Kind, kind_of


@dataclass(frozen=True)
class Scanned:
    """One tar.

    Attributes:
        shard: Its entry in the index.
        offsets: Of its samples, and where they end.
        first: Its first sample.
        last: Its last sample.
        found: What the kind of corpus found in it.
        left_out: Names of members that belong to no sample.
    """

    shard: Shard
    offsets: NDArray[np.uint64]
    first: Sample
    last: Sample
    found: Any
    left_out: list[str]


def index_shards(
    sources: Sequence[str],
    out: Path | None = None,
    *,
    kind: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Write the index of tars that are there already.

    Args:
        sources: Paths, globs, braces, folders or URLs of tars.
        out: Folder of the index; by default that of the tars.
        kind: ``"text"`` or ``"images"``; by default what the first sample looks like.
        workers: Processes that scan.
        overwrite: Replace an index, and sidecars that something else wrote.
        progress: Show a progress bar on stderr.
        options: Of the kind: ``tokenizer`` of text, ``caption_key``, ``image_member``, ``caption_member`` and
            ``max_corrupt`` of images.

    Returns:
        One line that says what was indexed.

    Raises:
        UsageError: A tar that cannot be read to its end, or holds what webdataset would lose; samples of another kind;
            shards of one name; an index that is there already.
    """
    paths = expand_shards(sources)
    folder = _folder(paths, out)
    _check_free(folder, paths, overwrite)
    given = options or {}
    named = "images" if given.get("image_member") else None
    chosen = kind or named or kind_of(next(scan(open_bytes(paths[0]), paths[0])), paths[0])
    reader = _reader(chosen, given)
    tars = LocalPool(min(workers, len(paths))).run(scan_shard, reader, zip(paths, paths, strict=True))
    by_path = dict(tqdm(tars, "indexing", len(paths), unit="tar", disable=not progress))
    scanned = [by_path[path] for path in paths]
    _check_neighbours(scanned)
    shards = [_placed(one.shard, folder, path) for one, path in zip(scanned, paths, strict=True)]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found = [one.found for one in scanned]
    index = reader.index(folder, shards, found, tuple(sources))
    for one in scanned:
        sidecar = folder / one.shard.idx_name
        with writing(sidecar):
            write_atomically(sidecar, one.offsets.astype("<u8").tobytes())
    index.save(folder)
    left_out = [name for one in scanned for name in one.left_out]
    clutter = (
        f"; {len(left_out)} files that belong to no sample left out (the first: {left_out[0]})" if left_out else ""
    )
    return f"{folder}: {index.rows:,} rows of {chosen} in {len(shards)} shards{reader.remarks(found)}{clutter}"


def _reader(kind: str, options: Mapping[str, Any]) -> Kind:
    known = inspect.signature(KINDS[kind]).parameters
    for name in options:
        if name not in known:
            raise UsageError(f"--{name} does not go with shards of {kind}: leave it out")
    return KINDS[kind](**options)


def expand_shards(sources: Sequence[str]) -> list[str]:
    """Paths and URLs of tars that sources name, in their order; a glob's and a folder's by name.

    Raises:
        UsageError: A source that names nothing, or a tar that comes twice.
    """
    from braceexpand import braceexpand

    paths: list[str] = []
    for source in sources:
        for name in braceexpand(source):
            found = [name] if is_remote(name) else _local(name)
            if not found:
                raise UsageError(f"{name}: no such tar; give tars, a folder of them or URLs")
            paths += found
    for path in paths:
        if not path.endswith(".tar"):
            raise UsageError(f"{path}: only plain tars (.tar) can be read by offset; unpack compressed ones first")
    names = [path.rsplit("/", 1)[-1] for path in paths]
    for name, count in Counter(names).items():
        if count > 1:
            raise UsageError(f"two shards are called {name}: index each folder by itself, as a corpus of its own")
    return paths


def _local(name: str) -> list[str]:
    path = Path(name)
    if path.is_dir():
        return sorted(map(str, path.glob("*.tar")))
    if path.is_file():
        return [name]
    return sorted(map(str, path.parent.glob(path.name))) if any(sign in path.name for sign in "*?[") else []


def _folder(paths: Sequence[str], out: Path | None) -> Path:
    if out is not None:
        return out
    parents = {path.rsplit("/", 1)[0] if "/" in path else "." for path in paths}
    if len(parents) > 1 or is_remote(paths[0]):
        raise UsageError("these shards are not in one local folder; give the folder of their index with --out")
    return Path(parents.pop())


def _check_free(folder: Path, paths: Sequence[str], overwrite: bool) -> None:
    if overwrite:
        return
    if (folder / INDEX_FILE).exists():
        raise UsageError(
            f"{folder} has an {INDEX_FILE} already; add --overwrite to replace it, or choose another --out"
        )
    for path in paths:
        sidecar = folder / Path(path.rsplit("/", 1)[-1]).with_suffix(".idx")
        if sidecar.exists():
            raise UsageError(
                f"{sidecar} exists and is not ours; add --overwrite to replace it, or choose another --out"
            )


def _placed(shard: Shard, folder: Path, path: str) -> Shard:
    """Return the shard with its address if it is not next to the index."""
    if is_remote(path):
        return Shard(**{**vars(shard), "url": path})
    together = Path(path).resolve().parent == folder.resolve()
    return shard if together else Shard(**{**vars(shard), "url": str(Path(path).resolve())})


def scan_shard(reader: Kind, path: str) -> Scanned:
    """Return the offsets, hash and contents of one tar."""
    content, left_out = open_bytes(path), list[str]()
    samples = list(scan(content, path, left_out))
    found = reader.read(samples, content, path)
    name = path.rsplit("/", 1)[-1]
    shard = Shard(name, content.size, len(samples), reader.rows(found), sha256_of(content))
    ends = np.array([*(reader.offset(sample, path) for sample in samples), samples[-1].end], dtype=np.uint64)
    return Scanned(shard, ends, samples[0], samples[-1], found, left_out)


def _check_neighbours(scanned: Sequence[Scanned]) -> None:
    for before, after in pairwise(scanned):
        if before.last.key != after.first.key:
            continue
        extensions = [{member.extension for member in sample.members} for sample in (before.last, after.first)]
        advice = "rename one" if extensions[0] & extensions[1] else "write the shards again, each with whole samples"
        raise UsageError(
            f"{after.shard.name} begins with key {after.first.key!r}, with which {before.shard.name} ends: "
            f"webdataset would make one sample of them; {advice}"
        )
