"""Captioned images of named corpora as exact global batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from .. import UsageError
from .base import Corpus, StreamDataModule
from .corpora.images import ImageRows, ImageShards
from .image_reader import CropSettings, ImageReader, Images, describe_left_out
from .imaging.corrupt import CorruptImages
from .imaging.decoding import MAX_PIXELS
from .imaging.filters import Filters
from .imaging.geometry import Size, buckets
from .sampling.micro_batches import Batch, Reader
from .streaming.image_stream import ImageStream

__all__ = ["Corpus", "ImageTextDataModule"]

NAMED = 5  # corrupt images that are named in the log; the others are counted


class ImageTextDataModule(StreamDataModule[Images]):
    """Images with captions from named corpora, with replay of old ones, as the same global batches on any machine.

    A batch is a dict of ``image``, a uint8 tensor (n, 3, height, width), ``caption``, a list of n texts, and of NumPy
    arrays: ``seed`` (n,), from which a model draws all that is random about a sample, so that it does not depend on
    ranks or micro-batches; ``original_size`` (n, 2), height and width of the stored image; ``crop`` (n, 4), top, left,
    height and width of what is shown, in its pixels; ``replaced`` (n,), whether the image took a corrupt one's place;
    in training ``corpus`` and ``row`` (n,), and ``quantile`` (n,), numbers in [0, 1) that are evenly spread over the
    global batch, for diffusion times. Validation batches have tensors ``row`` and ``valid`` (n,), which is 0 for
    samples that only fill up; their images are cropped in the centre and keep their captions.

    With ``max_aspect`` above 1 each global batch has one of several shapes of about equal area. Which one is a function
    of the step; a corpus that has no image of a shape gives those of the nearest one, cropped more.

    Args:
        dataset: Name of what is being learnt; another name later means another dataset.
        corpora: Training corpora by name. Old data keeps its name, so that it comes in the order of its first reading.
        val: Folders of validation corpora by name.
        image_size: Side in pixels of the square shown, or of the square whose area other shapes have.
        micro_batch_size: Images in one forward pass of one device.
        global_batch_size: Images in one optimizer step; gradient accumulation follows from it.
        num_workers: Loader processes of each device.
        seed: Seed of the order, and of what is random about samples.
        shuffle: ``"full"`` over all images, or ``"window"``, which reads blocks of neighbouring ones.
        max_aspect: Longest side over shortest of the shapes; 1 for squares only.
        bucket_multiple: Of which the sides of shapes are multiples.
        shapes: Heights and widths instead of ``max_aspect``.
        resize: Side of a square that an image covers before the shape is cropped from it; by default the shape itself.
        random_crop: Whether training crops at random places.
        flip: Share of training samples mirrored.
        caption_dropout: Share of training samples whose caption is "".
        filters: Which images to train on, by their sizes and scores.
        max_upscale: Leave out images that would have to be enlarged by more than this factor.
        max_corrupt: Share of samples that may turn out corrupt before the run is stopped.
        max_pixels: Larger images count as corrupt; they are never decoded.
        validate_every_n_steps: Steps between validations. Lightning's own ``val_check_interval`` counts micro-batches.

    Raises:
        UsageError: Sizes that do not divide, a corpus of which filters leave nothing, a shape that no image has, too
            many corrupt images, a checkpoint of the same dataset with other data.
    """

    def __init__(
        self,
        dataset: str,
        corpora: dict[str, Corpus],
        val: dict[str, str],
        image_size: int,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: Literal["full", "window"] = "full",
        max_aspect: float = 1.0,
        bucket_multiple: int = 64,
        shapes: list[tuple[int, int]] | None = None,
        resize: int | None = None,
        random_crop: bool = True,
        flip: float = 0.0,
        caption_dropout: float = 0.0,
        filters: Filters | None = None,
        max_upscale: float | None = None,
        max_corrupt: float = 0.1,
        max_pixels: int = MAX_PIXELS,
        validate_every_n_steps: int | None = None,
    ) -> None:
        sizes = (micro_batch_size, global_batch_size, num_workers)
        super().__init__(dataset, corpora, val, *sizes, seed, shuffle, validate_every_n_steps)
        for name, share in (("flip", flip), ("caption_dropout", caption_dropout), ("max_corrupt", max_corrupt)):
            if not 0 <= share <= 1:
                raise UsageError(f"{name} {share} must lie between 0 and 1")
        if image_size < 1:
            raise UsageError(f"image_size {image_size} must be at least 1")
        self.image_size = image_size
        self.sizes = _sizes(image_size, max_aspect, bucket_multiple, shapes)
        self.filters = filters or Filters()
        self.max_upscale = max_upscale
        self._chosen = shapes is not None
        self._crop_settings = CropSettings(self.sizes, resize, random_crop, flip, caption_dropout, max_pixels)
        self._corrupt = CorruptImages(max_corrupt)
        self._left_out = 0  # by filters, of streams

    @property
    def corrupt_images(self) -> int:
        """Return how many corrupt images this process has replaced in training since it began."""
        return self._corrupt.count

    def open_corpus(self, name: str, path: str) -> Images:
        """Open a corpus and log what filters leave of it; a stream counts that while it is read."""
        urls = self.streamed_tars(name, path)
        if urls is not None:
            if len(self.sizes) > 1:
                raise UsageError(f"corpus {name!r} is a stream, which has one shape; leave max_aspect and shapes out")
            return ImageStream(name, path, urls, self.filters, self.sizes[0], self.max_upscale)
        rows = ImageRows(ImageShards(path), self.filters, self.sizes, self.max_upscale)
        rank_zero_info(describe_left_out(name, rows))
        return rows

    def reader(self, sources: Sequence[Images]) -> Reader:
        """Return the function that decodes, crops and captions."""
        return ImageReader(sources, self._crop_settings)

    def example_batch(self, micro_batch_size: int) -> Batch:
        """Return a batch of black images of the largest shape; no corpus is needed."""
        n, (height, width) = micro_batch_size, max(self.sizes, key=lambda size: size[0] * size[1])
        places = np.zeros(n, dtype=np.int64)
        return {
            "image": torch.zeros(n, 3, height, width, dtype=torch.uint8),
            "caption": [""] * n,
            "seed": np.arange(n),
            "quantile": np.zeros(n),
            "original_size": np.array([(height, width)] * n),
            "crop": np.array([(0, 0, height, width)] * n),
            "replaced": np.zeros(n, dtype=np.bool_),
            "corrupt": [],
            "corpus": places,
            "row": places,
        }

    def bucket_of(self, names: Sequence[str]) -> tuple[Sequence[float], NDArray[np.int64]]:
        """Shapes by how many new images have them."""
        rows = [self._opened[self.corpora[name].path] for name in names]
        new = [(weight, self._opened[self.corpora[name].path]) for name, weight in self.new_weights().items()]
        weights = [
            sum(weight * one.buckets[bucket] / len(one) for weight, one in new) for bucket in range(len(self.sizes))
        ]
        if self._chosen and not all(weights):
            height, width = self.sizes[weights.index(0)]
            raise UsageError(f"shapes: no new image is nearest to {height}x{width}; leave it out")
        buckets = []
        for name, one in zip(names, rows, strict=True):
            reading = self.reading(name)  # what was not learnt in a shape is not replayed in it
            buckets.append(one.nearest_buckets(self.sizes, reading.rows if reading else None))
        return weights, np.array(buckets, dtype=np.int64)

    def bucket_name(self, bucket: int) -> str:
        """Height and width, where there are several shapes."""
        height, width = self.sizes[bucket]
        return f"{height}x{width}" if len(self.sizes) > 1 else ""

    def batch_used(self, batch: Batch) -> dict[str, float]:
        """Count corrupt images, name the first ones, and stop when there are too many."""
        for line in batch["corrupt"][: max(0, NAMED - self._corrupt.count)]:
            rank_zero_warn(f"corrupt image replaced: {line}")
        self._corrupt.add(len(batch["caption"]), batch["corrupt"], count=int(batch["replaced"].sum()))
        self._left_out += batch.get("left_out", 0)
        counts = {"data/corrupt": self._corrupt.count, "data/left_out": self._left_out}
        return {name: float(count) for name, count in counts.items() if count}


def _sizes(image_size: int, max_aspect: float, multiple: int, shapes: list[tuple[int, int]] | None) -> list[Size]:
    """Shapes from tall to wide."""
    if shapes is not None:
        if not shapes or any(min(shape) < 1 for shape in shapes):
            raise UsageError(f"shapes {shapes} must be heights and widths in pixels")
        return sorted(map(tuple, shapes), key=lambda size: size[1] / size[0])  # type: ignore[arg-type]
    return [(image_size, image_size)] if max_aspect == 1 else buckets(image_size, multiple, max_aspect)
