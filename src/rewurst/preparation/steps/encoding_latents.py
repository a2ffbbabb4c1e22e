"""Encode the images of a shard as latents.

1. Worker processes decode and crop the images of a corpus exactly as for training.
2. The networks run on batches of one shape that never cross a shard, so that no byte depends on which process makes
   which shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ...datamodules.corpora.images import ImageRows, ImageShards
from ...datamodules.corpora.latents import LatentIndex, array_bytes
from ...datamodules.image_reader import CropSettings, ImageReader
from ...datamodules.imaging.filters import Filters
from ...datamodules.imaging.geometry import Size, buckets, nearest_bucket
from ...datamodules.imaging.header import DecodeError
from ...datamodules.sampling.micro_batches import SampleIndices, as_is
from ..writing.destination import Target, everywhere
from ..writing.latent_writer import LatentFolder
from .latent_networks import Makers

SHARD_BYTES = 2**28
MOST_ROWS = 10_000

Group = tuple[int, list[int], int]
"""Shard, rows and bucket of a batch."""
Members = dict[str, bytes]


@dataclass(frozen=True)
class LatentOptions:
    """Options of :func:`rewurst.preparation.latents.prepare_latents`."""

    source: str
    out: str
    stage_b: str
    image_size: int
    what: tuple[str, ...]
    text_encoder: str | None
    stage_a: str | None
    max_aspect: float
    bucket_multiple: int
    resize: int | None
    batch_size: int
    workers: int
    device: str
    dtype: str
    samples_per_shard: int | None

    def everywhere(self) -> LatentOptions:
        """Return the options with absolute paths, for processes elsewhere; a name that is not a file is a hub name."""
        encoder = self.text_encoder
        return replace(
            self,
            source=everywhere(self.source),
            out=everywhere(self.out),
            stage_b=everywhere(self.stage_b),
            stage_a=self.stage_a and everywhere(self.stage_a),
            text_encoder=everywhere(encoder) if encoder and Path(encoder).exists() else encoder,
        )


class LatentWork:
    """Images, networks and the folder that is being filled.

    Args:
        options: What is asked for.

    Raises:
        UsageError: Numbers out of range, images or networks that cannot be read.
    """

    def __init__(self, options: LatentOptions) -> None:
        self.options = options
        self.images = ImageShards(options.source)
        size = options.image_size
        square = options.max_aspect == 1
        self.sizes = [(size, size)] if square else buckets(size, options.bucket_multiple, options.max_aspect)
        self.makers = Makers(
            options.stage_b, options.what, options.text_encoder, options.stage_a, options.dtype, options.device
        )
        most = max(map(self.makers.bytes_a_sample, self.sizes))
        rows = options.samples_per_shard or min(MOST_ROWS, max(1, SHARD_BYTES // most))
        shown = {"sizes": tuple(self.sizes), "resize": options.resize or 0}
        self.described = self.makers.described() | shown | {"images_sha256": self.images.index.fingerprint()}
        self.folder = LatentFolder(Target(options.out), self.images, rows, self.described)

    def plan(self) -> dict[str, Any]:
        """Return everything that decides the bytes; the networks' paths do not."""
        sources = LatentIndex.not_in_fingerprint()
        plan = {name: value for name, value in self.described.items() if name not in sources}
        return plan | {"batch_size": self.options.batch_size, "rows_per_shard": self.folder.rows_per_shard}

    def made(self, shard: int) -> tuple[list[Members], list[str]]:
        """Return the members of a shard's samples, and what was wrong with the images that cannot be read."""
        crops = CropSettings(self.sizes, self.options.resize, random_crop=False)
        reader = ImageReader([ImageRows(self.images, Filters(), self.sizes)], crops)
        groups = list(_groups(shard, self.folder, self.sizes, self.options.batch_size))
        loader = DataLoader(
            Groups(groups, reader, self.images),
            batch_size=None,
            num_workers=self.options.workers,
            collate_fn=as_is,  # type: ignore[arg-type]  # typed for lists; without batching it gets one sample
        )
        made, faults = dict[int, Members](), list[str]()
        for batch in loader:
            faults += batch["faults"].values()
            made |= {row: _left_out(reason) for row, reason in batch["faults"].items()}
            if batch["rows"]:
                made |= dict(zip(batch["rows"], _members(batch, self.makers), strict=True))
        nothing = _left_out("it has no image or no caption")
        return [made.get(row, nothing) for row in self.folder.rows(shard)], faults


class Groups(Dataset[dict[str, Any]]):
    """Decoded images, batch by batch; it goes to worker processes."""

    def __init__(self, groups: Sequence[Group], reader: ImageReader, images: ImageShards) -> None:
        self._groups, self._reader, self._images = groups, reader, images

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> dict[str, Any]:
        shard, rows, bucket = self._groups[number]
        [source] = self._reader.sources
        none = np.zeros(0, dtype=np.int64)
        picks = SampleIndices(none, none, none, bucket, training=False)
        read, shown, faults = [], [], {}
        for row in rows:
            try:
                shown.append(self._reader.show(source, row, 0, picks))
                read.append(row)
            except DecodeError as error:
                faults[row] = f"{self._images.locate(row)}: {error}"
        batch = self._reader.arrays(shown) if shown else {}
        return {**batch, "shard": shard, "rows": read, "shown": [one.about() for one in shown], "faults": faults}


def _groups(shard: int, folder: LatentFolder, sizes: Sequence[Size], batch_size: int) -> Iterator[Group]:
    """Batches of rows of one shape, in their order; rows without image or caption are in none."""
    rows = np.asarray(folder.rows(shard))
    facts = folder.images.facts[rows]
    buckets = np.where(facts["caption_length"] >= 0, nearest_bucket(facts["height"], facts["width"], list(sizes)), -1)
    for bucket in range(len(sizes)):
        mine = rows[buckets == bucket].tolist()
        for begin in range(0, len(mine), batch_size):
            yield shard, mine[begin : begin + batch_size], bucket


def _members(batch: dict[str, Any], makers: Makers) -> list[Members]:
    captions = [captions for captions, _, _ in batch["shown"]]
    samples = []
    for arrays, (texts, crop, size) in zip(makers(batch["image"], captions), batch["shown"], strict=True):
        members = {"txt": "\n".join(texts).encode()}
        members["json"] = json.dumps({"crop": crop, "original_size": size}).encode()
        samples.append(members | {f"{name}.npy": array_bytes(array) for name, array in arrays.items()})
    return samples


def _left_out(reason: str) -> Members:
    return {"json": json.dumps({"left_out": reason}).encode()}
