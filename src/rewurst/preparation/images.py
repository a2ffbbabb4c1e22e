"""Captioned pictures to shards: plain WebDataset tars of images, ``.txt`` and ``.json``, with an index.

1. ``sources.pictures`` lists the pictures of a source in a fixed order.
2. ``steps.recoding`` reads and checks them in worker processes; what cannot be used is counted, and bounded.
3. A hash of the image file decides whether it is held out: the same file is always on the same side.
4. ``engine.image_units`` packs the samples of each side into shards, and keeps what is done. The index comes last: a
   folder without one is unfinished.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .. import UsageError
from ..datamodules.storage.random_access import join
from .engine import open_engine
from .engine.image_units import ImageJob, prepare_image_units
from .engine.resumable_units import begin
from .sources.pictures import drawings, listing
from .sources.pictures.folders import EXPECTED
from .sources.pictures.listing import Listing, joined
from .sources.pictures.shapes import PICTURES
from .steps.recoding import Recoding
from .writing.destination import Target, everywhere
from .writing.folders import IMAGE_LAYOUT, shard_name


def prepare_images(
    sources: Sequence[str],
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
    """Write the pictures of sources into ``out/train`` and, with ``held_out`` above 0, ``out/val``.

    A source with splits of its own, by names such as ``validation/metadata.csv`` or
    ``data/test-00000-of-00001.parquet``, also has ``out/val`` and ``out/test``. ``builtin:shapes`` and
    ``builtin:shapes-new`` are drawn: ``val`` holds a fresh picture of each combination that ``train`` shows, ``unseen``
    the combinations that it does not. Each line of a .txt, and each text of a list, is a caption of its picture; all
    are kept, and training draws one of them each time. The same input gives the same bytes, whatever the engine and
    the number of workers. A preparation that was stopped, killed or failed leaves no index behind; the same call
    resumes it. Pictures on a server are recognized by their names.

    Args:
        sources: One or more: folder of images with a .txt, .caption or .json next to each; .jsonl, .csv or .parquet
            with file names or images and captions; folder with such a table, or with a train/ and others that have one;
            folder of a dataset from the hub; URL of one of these; builtin:shapes or builtin:shapes-new.
        out: Folder or URL to write, new or empty; every machine of a cluster has to see it.
        held_out: Share of the pictures kept for validation, in [0, 1); drawn pictures have their own.
        recoding: Size and format in which pictures are stored.
        workers: Number of worker processes (default: 1; with ray: all there is room for).
        max_corrupt: Share of the pictures that may be corrupt; they are left out.
        skip_without_caption: Leave out pictures without a caption instead of failing.
        image_field: Field of a table with file names or images (default: file_name, image or path).
        caption_field: Field with captions, of a table or of the .json next to each picture (default: text or caption).
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
    names = [sources] if isinstance(sources, str) else list(sources)
    with open_engine(engine, workers, ray_address) as pool:
        listed = _listed(names, recoding.image_size or 64, pictures, seed, image_field, caption_field, engine)
        if held_out and set(listed.sides) - {"train"}:
            raise UsageError(
                f"held_out is {held_out}, expected none for {' '.join(names)}: it has held-out pictures itself"
            )
        sides = listed.sides or (("train", "val") if held_out else ("train",))
        name, target = shard_name(names[0], otherwise="images"), Target.for_engine(engine, out)
        job = ImageJob(target, name, sides, held_out, recoding, samples_per_shard, skip_without_caption)
        asked = {"source": names[0] if len(names) == 1 else names, "pictures": pictures, "seed": seed}
        begin(target, job.plan() | asked, IMAGE_LAYOUT, overwrite)
        counts, faults = prepare_image_units(listed, names, job, max_corrupt, pool, progress)
    for side in sides:
        print(f"{join(str(out), side)}: {counts[side][0]} pictures in {counts[side][1]} shards", file=sys.stderr)
    for remark in (*faults.remarks(), listed.remark):
        if remark:
            print(remark, file=sys.stderr)
    return {side: counts[side][0] for side in sides}


def _listed(
    names: Sequence[str],
    size: int,
    pictures: int,
    seed: int,
    image_field: str | None,
    caption_field: str | None,
    engine: str,
) -> Listing:
    if not names:
        raise UsageError(f"no sources given, expected {EXPECTED}")
    listings = []
    for name in names:
        if name.startswith("builtin:"):
            listings.append(drawings(name, size, pictures, seed))
        else:
            listings.append(listing(everywhere(name) if engine == "ray" else name, image_field, caption_field))
    return joined(listings)


def _check(held_out: float, max_corrupt: float, samples_per_shard: int | None) -> None:
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is {held_out}, expected a share of the pictures from 0 to below 1")
    if not 0 <= max_corrupt <= 1:
        raise UsageError(f"max_corrupt is {max_corrupt}, expected a share of the pictures from 0 to 1")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UsageError(f"samples_per_shard is {samples_per_shard}, expected 1 or more")
