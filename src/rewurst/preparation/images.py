"""Captioned pictures to shards: plain WebDataset tars of images, ``.txt`` and ``.json``, with an index.

1. ``sources.pictures`` lists the pictures of a source in a fixed order.
2. ``steps.recoding`` reads and checks them in worker processes; what cannot be used is counted, and bounded.
3. A hash of the image file decides whether it is held out: the same file is always on the same side.
4. ``engine.image_units`` packs the samples of each side into shards, and keeps what is done. The index comes last: a
   folder without one is unfinished.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from .. import UsageError
from ..datamodules.storage.random_access import join
from .engine import open_engine
from .engine.image_units import ImageJob, prepare_image_units
from .engine.resumable_units import begin
from .sources.pictures import drawings, listing
from .sources.shapes import PICTURES
from .steps.recoding import Recoding
from .writing.destination import Target, everywhere
from .writing.folders import IMAGE_LAYOUT, shard_name


def prepare_images(
    source: str,
    out: str | Path,
    *,
    held_out: float = 0.0,
    recoding: Recoding | None = None,
    workers: int | None = None,
    max_corrupt: float = 0.05,
    skip_without_caption: bool = False,
    image_field: str | None = None,
    caption_field: str | None = None,
    samples_per_shard: int | None = None,
    pictures: int = PICTURES,
    seed: int = 0,
    overwrite: bool = False,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write the pictures of a source into ``out/train`` and, with ``held_out`` above 0, ``out/val``.

    ``builtin:shapes`` and ``builtin:shapes-new`` are drawn: ``val`` holds a fresh picture of each combination that
    ``train`` shows, ``unseen`` the combinations that it does not. The same input gives the same bytes, whatever the
    engine and the number of workers. A preparation that was stopped, killed or failed leaves no index behind; the same
    call resumes it. Pictures on a server are recognized by their names.

    Args:
        source: Folder of images with a .txt next to each (and perhaps a .json), .jsonl or .parquet with file names or
            images and captions, folder with metadata.jsonl or metadata.parquet, URL of one of these, builtin:shapes or
            builtin:shapes-new.
        out: Folder or URL to write, new or empty; every machine of a cluster has to see it.
        held_out: Share of the pictures kept for validation, in [0, 1); drawn pictures have their own.
        recoding: Size and format in which pictures are stored.
        workers: Number of worker processes (default: 1; with ray: all there is room for).
        max_corrupt: Share of the pictures that may be corrupt; they are left out.
        skip_without_caption: Leave out pictures without a caption instead of failing.
        image_field: Field of a table with file names (default: file_name, image or path).
        caption_field: Field of a table with captions (default: text or caption).
        samples_per_shard: Number of pictures per shard (default: shards of about 256 MiB).
        pictures: Number of pictures drawn per combination of builtin:shapes.
        seed: Seed of drawn pictures.
        overwrite: Replace what an earlier preparation left in ``out``.
        engine: Engine that runs the work: worker processes here, or the machines of a Ray cluster.
        ray_address: Address of the Ray cluster (default: RAY_ADDRESS, or a cluster that is started here).
        progress: Whether to show progress bars on stderr.

    Returns:
        Samples of each side.

    Raises:
        UsageError: Arguments out of range, a source that cannot be read, too many corrupt pictures, one without a
            caption, no picture for a side, an ``out`` that is not empty, a full disk.
    """
    _check(held_out, max_corrupt, samples_per_shard)
    recoding = recoding or Recoding()
    with open_engine(engine, workers, ray_address) as pool:
        if source.startswith("builtin:"):
            listed = drawings(source, recoding.image_size or 64, pictures, seed)
            if held_out:
                raise UsageError(f"held_out is {held_out}, expected none for {source}: it has held-out pictures itself")
        else:
            listed = listing(everywhere(source) if engine == "ray" else source, image_field, caption_field)
        sides = listed.sides or (("train", "val") if held_out else ("train",))
        name, target = shard_name(source, otherwise="images"), Target.for_engine(engine, out)
        job = ImageJob(target, name, sides, held_out, recoding, samples_per_shard, skip_without_caption)
        begin(target, job.plan() | {"source": source, "pictures": pictures, "seed": seed}, IMAGE_LAYOUT, overwrite)
        counts, faults = prepare_image_units(listed, source, job, max_corrupt, pool, progress)
    for side in sides:
        print(f"{join(str(out), side)}: {counts[side][0]} pictures in {counts[side][1]} shards", file=sys.stderr)
    for remark in (*faults.remarks(), listed.remark):
        if remark:
            print(remark, file=sys.stderr)
    return {side: counts[side][0] for side in sides}


def _check(held_out: float, max_corrupt: float, samples_per_shard: int | None) -> None:
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is {held_out}, expected a share of the pictures from 0 to below 1")
    if not 0 <= max_corrupt <= 1:
        raise UsageError(f"max_corrupt is {max_corrupt}, expected a share of the pictures from 0 to 1")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UsageError(f"samples_per_shard is {samples_per_shard}, expected 1 or more")
