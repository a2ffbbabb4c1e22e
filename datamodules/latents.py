"""Latents of captioned images as the same global batches as the images themselves, without decoding any."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from .. import UsageError
from .base import Corpus
from .corpora.images import ImageRows
from .corpora.latents import LatentShards
from .image_reader import ReplacingReader, describe_left_out
from .images import ImageTextDataModule
from .imaging.captions import choose
from .imaging.filters import Filters
from .imaging.geometry import Crop, Size, uniform
from .sampling.micro_batches import Batch, Reader, SampleIndices

__all__ = ["Corpus", "LatentDataModule"]


@dataclass(frozen=True)
class ShownLatents:
    """One sample of a batch: arrays by name, what they show of the stored image, its size, the caption."""

    arrays: dict[str, NDArray[Any]]
    crop: Crop
    original_size: Size
    caption: str


class LatentReader(ReplacingReader[ShownLatents]):
    """SampleIndices -> a batch of latents."""

    def show(self, source: Any, row: int, seed: int, picks: SampleIndices) -> ShownLatents:
        """One sample; a caption is dropped where the data module of images would drop it."""
        shards = source.shards
        assert isinstance(shards, LatentShards)
        members = shards.members(row)
        arrays = shards.arrays(members)
        about = json.loads(members["json"])
        captions = shards.index.captions(members) or [""]
        chosen = choose(captions, seed if picks.training else None)
        caption = captions[chosen]
        if "text" in arrays and arrays["text"].ndim > 2:  # the states of each caption
            arrays["text"] = arrays["text"][chosen]
        drop = uniform(seed, "flip, caption", 2)[1] if picks.training else 1.0
        if drop < self._crop_settings.caption_dropout:
            caption = ""
            if "text" in arrays:
                arrays["text"] = self._empty_text(shards)
        height, width = about["original_size"]
        return ShownLatents(arrays, Crop(*about["crop"]), (height, width), caption)

    def arrays(self, shown: Sequence[ShownLatents]) -> Batch:
        """``z``, and ``a`` where every corpus has it, in float32; so ``text``, but as it is stored: it is large."""
        batch: Batch = {}
        for name in ("z", "a"):
            if all(name in one.arrays for one in shown):
                stacked = np.stack([one.arrays[name] for one in shown])
                batch[name] = torch.from_numpy(stacked.astype(np.float32))
        if all("text" in one.arrays for one in shown):
            batch["text"] = torch.from_numpy(np.stack([one.arrays["text"] for one in shown]))
        return batch

    def _empty_text(self, shards: LatentShards) -> NDArray[Any]:
        kept: dict[str, NDArray[Any]] = self.__dict__.setdefault("_empty", {})
        if shards.path not in kept:
            kept[shards.path] = shards.empty_text()
        return kept[shards.path]


class LatentDataModule(ImageTextDataModule):
    """Latents that ``rewurst prepare latents`` made, with captions, as the same global batches on any machine.

    For the same names and numbers of images, and the same seed, samples come in the same slots as those of
    :class:`ImageTextDataModule` with ``random_crop=False``, with the same ``seed``, captions dropped alike. A batch has
    ``z``, (n, c, h, w) in float32, in the place of ``image``; where they were prepared, ``a``, Stage A's latents,
    alike, and ``text``, (n, length, width).

    Args:
        dataset: Name of what is being learnt; another name later means another dataset.
        corpora: Training corpora by name. Old data keeps its name, so that it comes in the order of its first reading.
        val: Folders of validation corpora by name.
        micro_batch_size: Samples in one forward pass of one device.
        global_batch_size: Samples in one optimizer step; gradient accumulation follows from it.
        num_workers: Loader processes of each device.
        seed: Seed of the order, and of what is random about samples.
        shuffle: ``"full"`` over all samples, or ``"window"``, which reads blocks of neighbouring ones.
        caption_dropout: Share of training samples whose caption is "".
        filters: Which images to train on, by their sizes and scores.
        max_upscale: Leave out images that had to be enlarged by more than this factor.
        max_corrupt: Share of samples that may turn out to have no latents before the run is stopped.
        validate_every_n_steps: Steps between validations. Lightning's own ``val_check_interval`` counts micro-batches.

    Raises:
        UsageError: Sizes that do not divide, latents of different sizes or makers, too many samples without latents, a
            checkpoint of the same dataset with other data.
    """

    def __init__(
        self,
        dataset: str,
        corpora: dict[str, Corpus],
        val: dict[str, str],
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: Literal["full", "window"] = "full",
        caption_dropout: float = 0.0,
        filters: Filters | None = None,
        max_upscale: float | None = None,
        max_corrupt: float = 0.1,
        validate_every_n_steps: int | None = None,
    ) -> None:
        super().__init__(
            dataset,
            corpora,
            val,
            1,  # sizes are the latents' own
            micro_batch_size,
            global_batch_size,
            num_workers,
            seed,
            shuffle,
            random_crop=False,
            caption_dropout=caption_dropout,
            filters=filters,
            max_upscale=max_upscale,
            max_corrupt=max_corrupt,
            validate_every_n_steps=validate_every_n_steps,
        )
        self._first: LatentShards | None = None

    @property
    def made_by(self) -> Mapping[str, Mapping[str, str]]:
        """Fingerprint and source of the networks that made the latents, by name, with a ``corpus`` made by them."""
        if self._first is None:
            return {}
        return {name: {**kept, "corpus": self._first.path} for name, kept in self._first.index.made_by.items()}

    def open_corpus(self, name: str, path: str) -> ImageRows:
        """Open a corpus, which must be like the others."""
        if self.streamed_tars(name, path) is not None:
            raise UsageError(f"corpus {name!r} is a stream, which latents cannot be; index or prepare it")
        shards = LatentShards(path)
        self._first = self._first or shards
        self._check_alike(self._first, shards)
        self.sizes = [(height, width) for height, width in shards.index.sizes]
        rows = ImageRows(shards, self.filters, self.sizes, self.max_upscale)
        rank_zero_info(describe_left_out(name, rows))
        return rows

    def reader(self, sources: Sequence[Any]) -> Reader:
        """Return the function that reads arrays."""
        return LatentReader(sources, self._crop_settings)

    def example_batch(self, micro_batch_size: int) -> Batch:
        """Return one sample of the largest shape, repeated: only a corpus knows the shapes of its latents.

        Raises:
            UsageError: The first corpus is missing.
        """
        name, corpus = next(iter(self.corpora.items()))
        rows: Any = self._opened.get(corpus.path) or self.open_corpus(name, corpus.path)
        buckets = [bucket for bucket, count in enumerate(rows.buckets) if count]
        bucket = max(buckets, key=lambda bucket: self.sizes[bucket][0] * self.sizes[bucket][1])
        zeros = np.zeros(micro_batch_size, dtype=np.int64)
        row = rows.in_bucket(bucket, zeros)
        seed, quantile = np.arange(micro_batch_size), zeros.astype(np.float64)
        picks = SampleIndices(zeros, row, seed, bucket, training=True, quantile=quantile)
        return self.reader([rows])(picks) | {"corpus": zeros, "row": row}

    def bucket_of(self, names: Sequence[str]) -> tuple[Sequence[float], NDArray[np.int64]]:
        """Shapes by how many new images have them; latents of another shape cannot take their place."""
        weights, buckets = super().bucket_of(names)
        for name, of_corpus in zip(names, buckets, strict=True):
            for bucket, weight in enumerate(weights):
                if weight and of_corpus[bucket] != bucket:
                    raise UsageError(
                        f"corpus {name!r} has no latents of {self.bucket_name(bucket)} pixels, which others have: "
                        "prepare all of them with one shape, or give it images of that shape"
                    )
        return weights, buckets

    def _check_alike(self, first: LatentShards, other: LatentShards) -> None:
        sides = [[list(size) for size in shards.index.sizes] for shards in (first, other)]
        if sides[0] != sides[1]:
            raise UsageError(f"{other.path} has latents of sizes {sides[1]}, {first.path} of {sides[0]}: prepare alike")
        for name, kept in first.index.made_by.items():
            made = other.index.made_by.get(name, kept)
            if made["sha256"] != kept["sha256"]:
                raise UsageError(
                    f"{other.path} was made by the {name} of {made['source']}, {first.path} by another, of "
                    f"{kept['source']}: prepare one of them again"
                )
