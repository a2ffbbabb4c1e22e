"""Encode images as latents once: embeddings, Stage A latents and text states, in shards that training reads.

1. ``steps.encoding_latents`` makes whole shards, each from the images and networks alone.
2. ``writing.latent_writer`` writes them and, when all are there, the index.

Processes share the shards: by number (``shard_of``), or as the units of a Ray cluster.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from .. import UsageError
from ..datamodules.corpora.latents import EMPTY_TEXT_FILE, LatentIndex
from ..datamodules.imaging.corrupt import CorruptImages
from .engine import open_engine
from .engine.resumable_units import Record, Stage, Unit, begin, complete, finish, progress_bar
from .steps.encoding_latents import LatentOptions, LatentWork
from .writing.folders import LATENT_LAYOUT
from .writing.latent_writer import LatentFolder


def prepare_latents(
    source: str,
    out: str | Path,
    stage_b: str,
    image_size: int,
    *,
    what: tuple[str, ...] = ("z",),
    text_encoder: str | None = None,
    stage_a: str | None = None,
    max_aspect: float = 1.0,
    bucket_multiple: int = 64,
    resize: int | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "cpu",
    dtype: Literal["float16", "float32"] = "float16",
    samples_per_shard: int | None = None,
    shard_of: tuple[int, int] = (0, 1),
    max_corrupt: float = 0.05,
    overwrite: bool = False,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    progress: bool = True,
) -> str:
    """Write the latents of a corpus of images as a corpus of latents, row by row.

    Images are cropped as :class:`ImageTextDataModule` with ``random_crop=False`` crops them. A preparation that was
    stopped, killed or failed is resumed by the same call; shards that are done stay. A folder that was made from other
    images, networks or options is refused.

    Args:
        source: Folder or URL of the images, with ``index.json``.
        out: Folder or URL to write, new or one to resume; every machine of a cluster has to see it.
        stage_b: Checkpoint of Stage B with its Semantic Compressor, or a compressor's folder.
        image_size: Side in pixels at which images are shown.
        what: Arrays to store, separated by commas: z, a (Stage A's latents), text (states of the text encoder).
        text_encoder: Folder or hub name of a frozen CLIP text model, for text.
        stage_a: Checkpoint or folder of Stage A, for a (default: the one that Stage B's checkpoint names).
        max_aspect: Largest ratio of the longer to the shorter side of the shapes that images are cropped to.
        bucket_multiple: Number of pixels that the sides of these shapes are multiples of.
        resize: Side of a square that images cover before they are cropped (default: the shape itself).
        batch_size: Number of images that the networks see at once.
        workers: Number of processes that decode images (with ray: per shard in work).
        device: Device that the networks run on, such as cuda.
        dtype: Type of the stored arrays.
        samples_per_shard: Number of samples per shard (default: shards of up to 256 MiB).
        shard_of: Share I of N of the shards that this process makes.
        max_corrupt: Share of the images that may be corrupt; they have rows without latents.
        overwrite: Replace what an earlier preparation left in ``out``.
        engine: Engine that runs the work: worker processes here, or the machines of a Ray cluster.
        ray_address: Address of the Ray cluster (default: RAY_ADDRESS, or a cluster that is started here).
        progress: Whether to show a progress bar on stderr.

    Returns:
        One line that says what there is now.

    Raises:
        UsageError: Arguments out of range, networks that cannot be read, a folder that holds something else, too many
            corrupt images.
    """
    number, processes = shard_of
    if not 0 <= number < processes:
        raise UsageError(f"shard_of {number}/{processes}: the number must be at least 0 and below {processes}")
    if overwrite and processes > 1:
        raise UsageError("overwrite would delete the shards of the other processes: clear the folder before they start")
    if batch_size < 1 or workers < 0:
        raise UsageError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")
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
    gpus = int(device.startswith("cuda"))
    with open_engine(engine, None, ray_address, cpus=1 + workers, gpus=gpus) as pool:
        work = LatentWork(options)
        folder, job = work.folder, job_of(work)
        _open[job] = work
        if folder.is_complete() and not overwrite:
            folder.check_complete()
            return f"{out}: complete already"
        begin(folder.target, work.plan(), LATENT_LAYOUT, overwrite)
        corrupt, stage = CorruptImages(max_corrupt), Stage(folder.target, "shards", make_shard, job)
        if "text" in work.makers.parts:
            texts = Stage(folder.target, "empty_text", make_empty_text, job)
            complete(texts, [Unit("states", "0", None)], pool, progress_bar("empty text", "texts", 1, False))
        mine = [Unit(f"{shard:06d}", "0", shard) for shard in range(number, folder.shards, processes)]
        total = sum(len(folder.rows(unit.work)) for unit in mine)
        with progress_bar("latents", "images", total, progress) as bar:
            complete(stage, mine, pool, bar, lambda done: done["rows"], lambda done: _count(corrupt, done))
        if not _finish(folder, stage, max_corrupt):
            return f"{out}: this process's {len(mine)} shards are done; the index comes with the last of the others'"
    remark = f"; {corrupt.count} corrupt images have none, the first: {corrupt.named()}" if corrupt.count else ""
    return f"{out}: {len(work.images):,} rows of latents in {folder.shards} shards{remark}"


def _count(corrupt: CorruptImages, record: Record, final: bool = False) -> None:
    corrupt.add(record["seen"], record["corrupt"], final)


def _finish(folder: LatentFolder, stage: Stage[Job], max_corrupt: float) -> bool:
    """Write the index if all shards are done, and return whether they are; another process may be at it too.

    Raises:
        UsageError: Too many of all images are corrupt.
    """
    shards = [Unit(f"{shard:06d}", "0", shard) for shard in range(folder.shards)]
    if not folder.is_complete():
        if len(stage.done()) < len(shards):
            return folder.is_complete()
        try:
            records = [stage.read(unit) for unit in shards]
        except UsageError:
            if folder.is_complete():  # the other process has deleted them
                return True
            raise
        corrupt = CorruptImages(max_corrupt)
        for number, record in enumerate(records, 1):
            _count(corrupt, record, final=number == len(records))
        folder.finish(record["entry"] for record in records)
    finish(folder.target, ("shards", "empty_text"))
    return True


class Job(NamedTuple):
    """Settings of the processes that make shards.

    Attributes:
        options: Options of the preparation.
        described: JSON of what has to be the same in every process.
    """

    options: LatentOptions
    described: str


_open: dict[Job, LatentWork] = {}
"""Images and networks of this process, kept from one shard to the next."""


def make_shard(job: Job, unit: Unit) -> Record:
    """Write a shard; record its entry in the index, its rows, the images read and the corrupt ones among them."""
    work = _opened(job)
    samples, corrupt = work.made(unit.work)
    seen = int((work.images.facts["caption_length"][list(work.folder.rows(unit.work))] >= 0).sum())
    return {"entry": work.folder.write(unit.work, samples), "rows": len(samples), "seen": seen, "corrupt": corrupt}


def make_empty_text(job: Job, unit: Unit) -> Record:
    """Write the states of the empty text, made where all other states are made."""
    work = _opened(job)
    content = work.makers.empty_text()
    assert content is not None
    work.folder.target.write(EMPTY_TEXT_FILE, content)
    return {}


def _opened(job: Job) -> LatentWork:
    """Open images and networks, unless this process has done so.

    Raises:
        UsageError: They differ from those of the process that started the preparation.
    """
    if job not in _open:
        work = LatentWork(job.options)
        here, there = json.loads(_described(work)), json.loads(job.described)
        for name in there:
            if here.get(name) != there[name]:
                raise UsageError(
                    f"{job.options.out}: {name} is {here.get(name)} on this machine of the cluster, expected "
                    f"{there[name]}: give paths that are the same files on all of them"
                )
        _open.clear()
        _open[job] = work
    return _open[job]


def job_of(work: LatentWork) -> Job:
    """Return what the processes that make shards are given; their working directory may be another."""
    stage_a = work.makers.parts["a"].source if "a" in work.makers.parts else None
    return Job(replace(work.options, stage_a=stage_a).everywhere(), _described(work))


def _described(work: LatentWork) -> str:
    """Return what has to be the same everywhere; paths of networks do not."""
    where = LatentIndex.not_in_fingerprint()
    return json.dumps({name: value for name, value in work.described.items() if name not in where}, sort_keys=True)
