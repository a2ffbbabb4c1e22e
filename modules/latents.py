"""Latents of images, made once: embeddings, Stage A latents and text states into shards, for training that needs none.

1. ``datamodules`` decode and crop the images of a corpus, in worker processes, as they do for training.
2. The networks run on batches of one shape that never cross a shard, so that who makes which shard changes no byte.
3. ``datamodules.latent_writer`` writes shards and, when all are there, the index.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import UsageError
from ..datamodules.batches import Picks, as_is
from ..datamodules.geometry import Size, buckets, nearest_bucket
from ..datamodules.image_facts import Filters
from ..datamodules.image_header import DecodeError
from ..datamodules.image_reader import ImageReader, Showing
from ..datamodules.image_rows import ImageRows
from ..datamodules.image_shards import ImageShards
from ..datamodules.latent_index import MAKERS, array_bytes
from ..datamodules.latent_writer import LatentFolder
from .networks import VQGAN, SemanticCompressor, TextEncoder
from .stage_parts import Frozen
from .weights import is_one_file, read_file

SHARD_BYTES = 2**28
MOST_ROWS = 10_000
SETTLED = 200
"""Samples after which a share of corrupt ones means something."""

Group = tuple[int, list[int], int]
"""Shard, rows and lane of a batch."""
Members = dict[str, bytes]


class Makers:
    """The networks that make latents.

    Args:
        stage_b: Checkpoint with the compressor, or the compressor's folder.
        what: Names of arrays: ``z``, ``a``, ``text``.
        text_encoder: Folder or hub name, for ``text``.
        stage_a: Checkpoint or folder, for ``a``; by default the one that Stage B's checkpoint names.
        dtype: Of the arrays.
        device: To run on.

    Raises:
        UsageError: A network is missing or cannot be read, or an array is unknown.
    """

    def __init__(
        self,
        stage_b: str,
        what: Sequence[str],
        text_encoder: str | None = None,
        stage_a: str | None = None,
        dtype: str = "float16",
        device: str = "cpu",
    ) -> None:
        if unknown := [name for name in what if name not in MAKERS]:
            raise UsageError(f"what {unknown[0]!r} is unknown: choose among {', '.join(MAKERS)}")
        if "z" not in what:
            raise UsageError(f"what {','.join(what)} lacks z, which Stage C trains on: add it")
        if dtype not in ("float16", "float32"):
            raise UsageError(f"dtype {dtype!r} must be float16 or float32")
        if "text" in what and text_encoder is None:
            raise UsageError("what names text: give text_encoder, the folder or hub name of a frozen CLIP text model")
        self.what, self.dtype, self.device = tuple(name for name in MAKERS if name in what), dtype, torch.device(device)
        self.parts: dict[str, Frozen[Any]] = {
            "z": Frozen(SemanticCompressor.from_checkpoint(stage_b, torch.float32), stage_b)
        }
        if "a" in what:
            source = stage_a or _named_stage_a(stage_b)
            self.parts["a"] = Frozen(VQGAN.from_checkpoint(source, torch.float32), source)
        if "text" in what and text_encoder is not None:
            self.parts["text"] = Frozen(TextEncoder.from_pretrained(text_encoder), text_encoder)

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> list[dict[str, NDArray[Any]]]:
        """Arrays by name of each of a batch's images (n, 3, h, w), bytes."""
        pixels = images.to(self.device).float() / 255
        made = {"z": self.parts["z"].on(self.device)(pixels)}
        if "a" in self.parts:
            made["a"] = self.parts["a"].on(self.device).to_latents(pixels)
        if "text" in self.parts:
            made["text"] = self.parts["text"].on(self.device).encode(captions)
        arrays = {name: made[name].float().cpu().numpy().astype(self.dtype) for name in self.what}
        return [{name: array[i] for name, array in arrays.items()} for i in range(len(images))]

    def empty_text(self) -> bytes | None:
        """States of the text "" as a file, where there is a text encoder."""
        if "text" not in self.parts:
            return None
        states = self.parts["text"].on(self.device).encode([""])[0]
        return array_bytes(states.float().cpu().numpy().astype(self.dtype))

    def described(self) -> dict[str, Any]:
        """What the index says of them."""
        fields: dict[str, Any] = {"what": self.what, "dtype": self.dtype}
        for name, part in self.parts.items():
            fields |= {f"{MAKERS[name]}_sha256": part.fingerprint, f"{MAKERS[name]}_source": part.source}
        return fields

    def bytes_a_sample(self, size: Size) -> int:
        """About how much is stored of an image."""
        compressor = self.parts["z"].module
        numbers = compressor.config["c_latent"] * _cells(size, compressor.pixels_per_latent)
        if "a" in self.parts:
            vqgan = self.parts["a"].module
            numbers += vqgan.config["latent_channels"] * _cells(size, vqgan.compression)
        if "text" in self.parts:
            numbers += self.parts["text"].module.length * self.parts["text"].module.width
        return int(numbers) * np.dtype(self.dtype).itemsize + 2048


def prepare_latents(
    source: str,
    out: Path,
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
    progress: bool = True,
) -> str:
    """Write the latents of a corpus of images as a corpus of latents, row by row.

    Images are shown as :class:`ImageTextDataModule` with ``random_crop=False`` shows them. A preparation that was
    stopped goes on when it is asked for again; shards that are whole stay.

    Args:
        source: Folder of the images, with ``index.json``.
        out: Folder to fill.
        stage_b: Checkpoint with the Semantic Compressor, or its folder.
        image_size: As the data module's; so are ``max_aspect``, ``bucket_multiple`` and ``resize``.
        what: Arrays to make: ``z``; ``a`` for Stage A's latents, ``text`` for text states.
        text_encoder: Folder or hub name of a frozen CLIP text model.
        stage_a: Checkpoint or folder of Stage A; by default the one that Stage B's checkpoint names.
        max_aspect: See ``image_size``.
        bucket_multiple: See ``image_size``.
        resize: See ``image_size``.
        batch_size: Images that networks see at once.
        workers: Processes that decode.
        device: To run networks on.
        dtype: Of the arrays, ``float16`` or ``float32``.
        samples_per_shard: By default shards have up to 256 MiB.
        shard_of: This process's number and how many there are: each makes its share of the shards.
        max_corrupt: Share of the images that may be corrupt; they have rows without latents.
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
    images = ImageShards(source)
    sizes = [(image_size, image_size)] if max_aspect == 1 else buckets(image_size, bucket_multiple, max_aspect)
    makers = Makers(stage_b, what, text_encoder, stage_a, dtype, device)
    rows = samples_per_shard or min(MOST_ROWS, max(1, SHARD_BYTES // max(map(makers.bytes_a_sample, sizes))))
    images_sha256 = images.index.fingerprint()
    described = makers.described() | {"sizes": tuple(sizes), "resize": resize or 0, "images_sha256": images_sha256}
    folder = LatentFolder(out, images, rows, described, {"batch_size": batch_size})
    if folder.is_complete():
        return f"{out}: complete already"
    folder.begin(makers.empty_text())
    todo = [shard for shard in range(number, folder.shards, processes) if not folder.is_whole(shard)]
    reader = ImageReader([ImageRows(images, Filters(), sizes)], Showing(sizes, resize, random_crop=False))
    faults = Faults(max_corrupt)
    done = sum(len(folder.rows(shard)) for shard in range(number, folder.shards, processes) if shard not in todo)
    total = done + sum(len(folder.rows(shard)) for shard in todo)
    with tqdm(total=total, initial=done, unit=" images", desc="latents", disable=not progress, file=sys.stderr) as bar:
        for shard, samples in _made(todo, folder, sizes, reader, makers, batch_size, workers, faults):
            folder.write(shard, samples)
            bar.update(len(samples))
    if not folder.finish():
        return f"{out}: this process's {len(todo)} shards are done; the index comes with the last of the others'"
    return f"{out}: {len(images):,} rows of latents in {folder.shards} shards{faults.remark()}"


class Faults:
    """Images that could not be read, counted."""

    def __init__(self, most: float) -> None:
        self._most, self._seen, self._found = most, 0, list[str]()

    def count(self, seen: int, found: Sequence[str]) -> None:
        """Take note of a batch.

        Raises:
            UsageError: Too many are corrupt.
        """
        self._seen += seen
        self._found += found
        if self._seen >= SETTLED and len(self._found) > self._most * self._seen:
            raise UsageError(
                f"{len(self._found)} of {self._seen} images are corrupt, more than max_corrupt {self._most} allows; "
                f"the first is {self._found[0]}"
            )

    def remark(self) -> str:
        """The end of a line, empty where all went well."""
        return f"; {len(self._found)} corrupt images have none, the first is {self._found[0]}" if self._found else ""


class Groups(Dataset[dict[str, Any]]):
    """Decoded images, batch by batch; it goes to worker processes."""

    def __init__(self, groups: Sequence[Group], reader: ImageReader, images: ImageShards) -> None:
        self._groups, self._reader, self._images = groups, reader, images

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> dict[str, Any]:
        shard, rows, lane = self._groups[number]
        [source] = self._reader.sources
        none = np.zeros(0, dtype=np.int64)
        picks = Picks(none, none, none, lane, training=False)
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
    lanes = np.where(facts["caption_length"] >= 0, nearest_bucket(facts["height"], facts["width"], list(sizes)), -1)
    for lane in range(len(sizes)):
        mine = rows[lanes == lane].tolist()
        for begin in range(0, len(mine), batch_size):
            yield shard, mine[begin : begin + batch_size], lane


def _made(
    todo: Sequence[int],
    folder: LatentFolder,
    sizes: Sequence[Size],
    reader: ImageReader,
    makers: Makers,
    batch_size: int,
    workers: int,
    faults: Faults,
) -> Iterator[tuple[int, list[Members]]]:
    """Shards with the members of their samples, one after another."""
    groups = [group for shard in todo for group in _groups(shard, folder, sizes, batch_size)]
    left = {shard: sum(group[0] == shard for group in groups) for shard in todo}
    loader = DataLoader(
        Groups(groups, reader, folder.images),
        batch_size=None,
        num_workers=workers,
        collate_fn=as_is,  # type: ignore[arg-type]  # typed for lists; without batching it gets one sample
    )
    batches = iter(loader)
    for shard in todo:
        made: dict[int, Members] = {}
        for _ in range(left[shard]):
            batch = next(batches)
            faults.count(len(batch["rows"]) + len(batch["faults"]), list(batch["faults"].values()))
            made |= {row: _left_out(reason) for row, reason in batch["faults"].items()}
            if batch["rows"]:
                made |= dict(zip(batch["rows"], _members(batch, makers), strict=True))
        nothing = _left_out("it has no image or no caption")
        yield shard, [made.get(row, nothing) for row in folder.rows(shard)]


def _members(batch: dict[str, Any], makers: Makers) -> list[Members]:
    captions = [caption for caption, _, _ in batch["shown"]]
    samples = []
    for arrays, (caption, crop, size) in zip(makers(batch["image"], captions), batch["shown"], strict=True):
        members = {"txt": caption.encode(), "json": json.dumps({"crop": crop, "original_size": size}).encode()}
        samples.append(members | {f"{name}.npy": array_bytes(array) for name, array in arrays.items()})
    return samples


def _left_out(reason: str) -> Members:
    return {"json": json.dumps({"left_out": reason}).encode()}


def _cells(size: Size, pixels: float) -> float:
    return size[0] / pixels * size[1] / pixels


def _named_stage_a(stage_b: str) -> str:
    named = read_file(stage_b).get("frozen", {}).get("stage_a", {}) if is_one_file(stage_b) else {}
    if "source" not in named:
        raise UsageError(f"{stage_b} names no Stage A: give stage_a")
    return str(named["source"])
