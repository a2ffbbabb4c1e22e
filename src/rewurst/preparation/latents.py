"""Latents of images, made once: embeddings, Stage A latents and text states into shards, for training that needs none.

1. ``steps.encoding_latents`` makes whole shards, each from the images and networks alone.
2. ``writing.latent_writer`` writes them and, when all are there, the index.

Processes share the shards: by number (``shard_of``), or as the units of a Ray cluster.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .. import UsageError
from ..datamodules.corpora.latents import LatentIndex
from .cluster.ray_tasks import Ray, check_engine
from .steps.encoding_latents import Faults, LatentOptions, LatentWork


def prepare_latents(
    source: str,
    out: str | Path,
    stage_b: str,
    image_size: int,
    *,
    what: Sequence[str] = ("z",),
    text_encoder: str | None = None,
    stage_a: str | None = None,
    max_aspect: float = 1.0,
    bucket_multiple: int = 64,
    resize: int | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "cpu",
    dtype: str = "float16",
    samples_per_shard: int | None = None,
    shard_of: tuple[int, int] = (0, 1),
    max_corrupt: float = 0.05,
    engine: str = "local",
    ray_address: str | None = None,
    progress: bool = True,
) -> str:
    """Write the latents of a corpus of images as a corpus of latents, row by row.

    Images are shown as :class:`ImageTextDataModule` with ``random_crop=False`` shows them. A preparation that was
    stopped goes on when it is asked for again; shards that are whole stay.

    Args:
        source: Folder of the images, with ``index.json``, or its URL.
        out: Folder to fill, or its URL; with engine ``ray`` every machine sees it, as it does the networks' files.
        stage_b: Checkpoint with the Semantic Compressor, or its folder.
        image_size: As the data module's; so are ``max_aspect``, ``bucket_multiple`` and ``resize``.
        what: Arrays to make: ``z``; ``a`` for Stage A's latents, ``text`` for text states.
        text_encoder: Folder or hub name of a frozen CLIP text model.
        stage_a: Checkpoint or folder of Stage A; by default the one that Stage B's checkpoint names.
        max_aspect: See ``image_size``.
        bucket_multiple: See ``image_size``.
        resize: See ``image_size``.
        batch_size: Images that networks see at once.
        workers: Processes that decode; with engine ``ray`` for each shard in work.
        device: To run networks on; with engine ``ray`` a shard in work takes a GPU of the cluster for ``cuda``.
        dtype: Of the arrays, ``float16`` or ``float32``.
        samples_per_shard: By default shards have up to 256 MiB.
        shard_of: This process's number and how many there are: each makes its share of the shards.
        max_corrupt: Share of the images that may be corrupt; they have rows without latents.
        engine: ``local``, or ``ray`` for the machines of a Ray cluster.
        ray_address: Of the cluster, see :class:`.cluster.ray_tasks.Ray`.
        progress: Show a progress bar on stderr.

    Returns:
        One line that says what there is now.

    Raises:
        UsageError: Arguments out of range, networks that cannot be read, a folder that holds something else, too many
            corrupt images.
    """
    number, processes = shard_of
    if not 0 <= number < processes:
        raise UsageError(f"shard_of {number}/{processes}: the number must be at least 0 and below {processes}")
    if batch_size < 1 or workers < 0:
        raise UsageError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")
    check_engine(engine, ray_address)
    options = LatentOptions(
        source=source,
        out=str(out),
        stage_b=stage_b,
        image_size=image_size,
        what=tuple(what),
        text_encoder=text_encoder,
        stage_a=stage_a,
        max_aspect=max_aspect,
        bucket_multiple=bucket_multiple,
        resize=resize,
        batch_size=batch_size,
        workers=workers,
        device=device,
        dtype=dtype,
        samples_per_shard=samples_per_shard,
    )
    work = LatentWork(options)
    folder = work.folder
    if folder.is_complete():
        return f"{out}: complete already"
    mine = range(number, folder.shards, processes)
    faults = Faults(max_corrupt)
    gpus = int(device.startswith("cuda"))
    with Ray(ray_address, cpus=1 + workers, gpus=gpus) if engine == "ray" else nullcontext() as ray:
        folder.begin((lambda: _empty_text_on(ray, work)) if ray else work.makers.empty_text)
        todo = folder.left(mine)
        total, left = (sum(len(folder.rows(shard)) for shard in shards) for shards in (mine, todo))
        bar = tqdm(total=total, initial=total - left, unit=" images", desc="latents", disable=not progress)
        with bar:
            for rows in _on(ray, work, todo, faults) if ray else _here(work, todo, faults):
                bar.update(rows)
    if not folder.finish():
        return f"{out}: this process's {len(todo)} shards are done; the index comes with the last of the others'"
    return f"{out}: {len(work.images):,} rows of latents in {folder.shards} shards{faults.remark()}"


def _here(work: LatentWork, todo: Sequence[int], faults: Faults) -> Iterator[int]:
    """Rows of each shard that has been written."""
    for shard, samples in work.made(todo, faults):
        work.folder.write(shard, samples)
        yield len(samples)


def _on(ray: Ray, work: LatentWork, todo: Sequence[int], faults: Faults) -> Iterator[int]:
    """The same on a cluster, in the order in which shards are done."""
    units = ((f"shard {shard} of {work.options.out}", shard) for shard in todo)
    for _, made in ray.run(make_shard, job_of(work), units):
        faults.count(made.seen, made.faults)
        yield made.rows


class Job(NamedTuple):
    """For processes of a cluster: what is asked for, and what is to be the same there, as JSON."""

    options: LatentOptions
    described: str


class Made(NamedTuple):
    """Of a shard: its rows, the images that were read or could not be, and what was wrong with the latter."""

    rows: int
    seen: int
    faults: list[str]


def make_shard(job: Job, shard: int) -> Made:
    """Write a shard."""
    faults = Faults(1.0)
    rows = sum(_here(_opened(job), [shard], faults))
    return Made(rows, faults.seen, faults.found)


@lru_cache(maxsize=1)
def _opened(job: Job) -> LatentWork:
    """Images and networks, kept from one shard to the next.

    Raises:
        UsageError: They are others than those of the process that started the preparation.
    """
    work = LatentWork(job.options)
    here, there = json.loads(_described(work)), json.loads(job.described)
    for name in there:
        if here.get(name) != there[name]:
            raise UsageError(
                f"{job.options.out}: {name} is {here.get(name)} on this machine of the cluster, expected "
                f"{there[name]}: give paths that are the same files on all of them"
            )
    return work


def job_of(work: LatentWork) -> Job:
    """What processes of a cluster are given."""
    stage_a = work.makers.parts["a"].source if "a" in work.makers.parts else None
    return Job(replace(work.options, stage_a=stage_a).everywhere(), _described(work))


def _described(work: LatentWork) -> str:
    """Where networks came from apart."""
    where = LatentIndex.not_in_fingerprint()
    return json.dumps({name: value for name, value in work.described.items() if name not in where}, sort_keys=True)


def _empty_text_on(ray: Ray, work: LatentWork) -> bytes | None:
    if "text" not in work.makers.parts:
        return None
    [(_, content)] = ray.run(_empty_text, job_of(work), [("states of the empty text", None)])
    return content


def _empty_text(job: Job, unit: None) -> bytes | None:
    """Made where all other states are, so that they are made alike."""
    return _opened(job).makers.empty_text()
