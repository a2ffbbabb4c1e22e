"""Captioned pictures to shards: plain WebDataset tars of images, ``.txt`` and ``.json``, with an index.

1. ``image_sources`` lists the pictures of a source in one fixed order.
2. ``image_work`` reads and checks them in worker processes; what cannot be used is counted, and bounded.
3. A hash of the image file says whether it is held out: the same file is always on the same side.
4. One ordered pass writes the shards. The index comes last: a folder without one is unfinished.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .. import UsageError
from .folders import IMAGE_LAYOUT, make_folder, shard_name
from .image_sources import Listing, drawings, listing
from .image_work import Fault, Recoding, Sample, work
from .image_writer import ImageWriter
from .shapes import PICTURES

LISTED = 3  # faults that the summary names
ENOUGH = 1000  # pictures after which too many faults end the preparation early


def prepare_images(
    source: str,
    out: Path,
    *,
    held_out: float = 0.0,
    recoding: Recoding | None = None,
    workers: int = 1,
    max_corrupt: float = 0.05,
    skip_without_caption: bool = False,
    image_field: str | None = None,
    caption_field: str | None = None,
    samples_per_shard: int | None = None,
    pictures: int = PICTURES,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Write the pictures of a source into ``out/train`` and, with ``held_out`` above 0, ``out/val``.

    ``builtin:shapes`` and ``builtin:shapes-new`` are drawn: ``val`` holds a fresh picture of each combination that
    ``train`` shows, ``unseen`` the combinations that it does not. The same input gives the same bytes, whatever the
    number of workers. When it fails, no index is left behind.

    Args:
        source: A folder of images, each with a ``.txt`` of the same name beside it, and perhaps a ``.json``; a
            ``.jsonl`` or ``.parquet`` with file names (or images) and captions; a folder that holds such a table as
            ``metadata.jsonl`` or ``metadata.parquet``; ``builtin:shapes`` or ``builtin:shapes-new``.
        out: Folder, empty or new.
        held_out: Share of the pictures for validation, in [0, 1); drawn pictures bring their own.
        recoding: How pictures are stored, by default as they are. ``image_size`` is the side of drawn ones (64).
        workers: Processes that read and check; with 0 or 1 this one does.
        max_corrupt: Share of the pictures that may be corrupt, and are left out; with more the preparation fails.
        skip_without_caption: Leave pictures without a caption out, instead of failing.
        image_field: Field of a table with file names (default: file_name, image or path).
        caption_field: Field of a table with captions (default: text or caption).
        samples_per_shard: By default shards have about 256 MiB.
        pictures: Drawn of each combination.
        seed: Of drawn pictures.
        overwrite: Replace what an earlier preparation left in ``out``.
        progress: Show a progress bar on stderr.

    Returns:
        Samples of each side.

    Raises:
        UsageError: Arguments out of range, a source that cannot be read, too many corrupt pictures, one without a
            caption, no picture for a side, an ``out`` that is not empty, a full disk.
    """
    _check(held_out, workers, max_corrupt, samples_per_shard)
    recoding = recoding or Recoding()
    if source.startswith("builtin:"):
        listed = drawings(source, recoding.image_size or 64, pictures, seed)
        if held_out:
            raise UsageError(f"held_out is {held_out}, expected none for {source}: it brings its own held-out pictures")
    else:
        listed = listing(source, image_field, caption_field)
    sides = listed.sides or (("train", "val") if held_out else ("train",))
    make_folder(out, IMAGE_LAYOUT, overwrite)
    writers = {
        side: ImageWriter(out / side, shard_name(source, otherwise="images"), samples_per_shard, source)
        for side in sides
    }
    faults = Faults(max_corrupt, skip_without_caption)
    try:
        for sample in _samples(listed, recoding, workers, faults, progress):
            writers[sample.side or ("val" if sample.draw < held_out else "train")].append(sample)
        faults.check(final=True)
        counts = {side: writers[side].close() for side in reversed(sides)}
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    for side in sides:
        print(f"{out / side}: {counts[side]} pictures in {len(writers[side].shards)} shards", file=sys.stderr)
    for remark in (*faults.remarks(), listed.remark):
        if remark:
            print(remark, file=sys.stderr)
    return {side: counts[side] for side in sides}


class Faults:
    """Pictures that could not be used: counted, the first of each kind remembered.

    Args:
        max_corrupt: Share that may be corrupt.
        skip_without_caption: Whether pictures without a caption are left out rather than refused.
    """

    def __init__(self, max_corrupt: float, skip_without_caption: bool) -> None:
        self._max_corrupt, self._skip = max_corrupt, skip_without_caption
        self._seen = 0
        self._counts = {"corrupt": 0, "caption": 0}
        self._first: dict[str, list[Fault]] = {"corrupt": [], "caption": []}

    def count(self, result: Sample | Fault) -> None:
        """Take note of a picture.

        Raises:
            UsageError: It has no caption, or too many are corrupt.
        """
        self._seen += 1
        if isinstance(result, Sample):
            return
        if result.kind == "caption" and not self._skip:
            raise UsageError(f"{result.name}: no caption; add one, or leave such pictures out: --skip_without_caption")
        self._counts[result.kind] += 1
        if len(self._first[result.kind]) < LISTED:
            self._first[result.kind].append(result)
        if result.kind == "corrupt":
            self.check()

    def check(self, final: bool = False) -> None:
        """Raise where more are corrupt than may be; before the end only once that is sure enough."""
        corrupt = self._counts["corrupt"]
        if corrupt > self._max_corrupt * self._seen and (final or self._seen >= ENOUGH):
            raise UsageError(
                f"{corrupt} of {self._seen} pictures are corrupt, more than max_corrupt ({self._max_corrupt}) of them; "
                f"the first: {_named(self._first['corrupt'][:1])}"
            )

    def remarks(self) -> Iterator[str]:
        """One line for each kind of fault that there was."""
        for kind, what in (("corrupt", "corrupt pictures"), ("caption", "pictures without a caption")):
            if self._counts[kind]:
                yield f"{self._counts[kind]} {what} left out, the first: {_named(self._first[kind])}"


def _named(faults: Sequence[Fault]) -> str:
    return "; ".join(f"{fault.name} ({fault.reason})" for fault in faults)


def _samples(listed: Listing, recoding: Recoding, workers: int, faults: Faults, progress: bool) -> Iterator[Sample]:
    with tqdm(
        total=listed.total, unit=" pictures", unit_scale=True, desc="images", disable=not progress, file=sys.stderr
    ) as bar:
        for result in work(listed.pictures, recoding, workers):
            faults.count(result)
            bar.update()
            if isinstance(result, Sample):
                yield result


def _check(held_out: float, workers: int, max_corrupt: float, samples_per_shard: int | None) -> None:
    if not 0 <= held_out < 1:
        raise UsageError(f"held_out is {held_out}, expected a share of the pictures from 0 to below 1")
    if workers < 0:
        raise UsageError(f"workers is {workers}, expected 0 or more")
    if not 0 <= max_corrupt <= 1:
        raise UsageError(f"max_corrupt is {max_corrupt}, expected a share of the pictures from 0 to 1")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UsageError(f"samples_per_shard is {samples_per_shard}, expected 1 or more")
