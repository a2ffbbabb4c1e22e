"""Picked images to batches: decoded, cropped, captioned; a corrupt one is replaced by one that its slot determines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .. import UsageError
from .corpora.images import ImageRows
from .imaging.captions import choose
from .imaging.decoding import MAX_PIXELS, DecodeError, decode
from .imaging.geometry import Crop, Size, crop, resample, size_to_decode, uniform
from .sampling.micro_batches import Batch, SampleIndices
from .sampling.permutation import slot_seeds
from .streaming.image_stream import ImageStream

Images = ImageRows | ImageStream
REPLACEMENTS = 32  # tried for one slot; with half of the images corrupt all of them fail once in 4 billion slots


@dataclass(frozen=True)
class CropSettings:
    """How images are shown in training.

    Args:
        sizes: Height and width of each bucket.
        resize: Side of a square that the resized image covers, from which the size is cropped; none for the size.
        random_crop: Whether crops are at random places, rather than in the centre.
        flip: Share of the samples mirrored left to right.
        caption_dropout: Share of the samples whose caption is "".
        max_pixels: Larger images are taken for corrupt before they are decoded.
    """

    sizes: Sequence[Size]
    resize: int | None = None
    random_crop: bool = True
    flip: float = 0.0
    caption_dropout: float = 0.0
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class CroppedImage:
    """One image of a batch: pixels (h, w, 3), what they show of the stored image, the stored size, the caption.

    Attributes:
        captions: All captions of the image, of which ``caption`` is one unless it was dropped.
    """

    pixels: NDArray[np.uint8]
    crop: Crop
    original_size: Size
    caption: str
    captions: Sequence[str]

    def about(self) -> tuple[list[str], list[int], list[int]]:
        """Captions, crop and stored size as plain values."""
        return list(self.captions), list(map(int, self.crop)), list(map(int, self.original_size))


class DecodedSample(Protocol):
    """A decoded sample of a batch."""

    @property
    def crop(self) -> Crop:
        """The part of the stored image that is used."""
        ...

    @property
    def original_size(self) -> Size:
        """Height and width of the stored image."""
        ...

    @property
    def caption(self) -> str:
        """Its caption, or "" where that was dropped."""
        ...


S = TypeVar("S", bound=DecodedSample)


class ReplacingReader(ABC, Generic[S]):
    """SampleIndices -> a batch, in which other samples stand for those that cannot be read.

    Args:
        sources: Corpora, as picks number them.
        showing: How images are shown.
    """

    def __init__(self, sources: Sequence[Images], showing: CropSettings) -> None:
        self.sources, self._crop_settings = sources, showing
        self._streams = [source for source in sources if isinstance(source, ImageStream)]

    def __call__(self, picks: SampleIndices) -> Batch:
        """Read a micro-batch; ``corrupt`` lists the places of images that had to be replaced, and why."""
        corrupt: list[str] = []
        replaced = np.zeros(len(picks.row), dtype=np.bool_)
        shown = []
        for i, (corpus, row, seed) in enumerate(zip(picks.corpus, picks.row, picks.seed, strict=True)):
            before = len(corrupt)
            shown.append(self._one(self.sources[int(corpus)], int(row), int(seed), picks, corrupt))
            replaced[i] = len(corrupt) > before
        return {
            **self.arrays(shown),
            "caption": [one.caption for one in shown],
            "seed": picks.seed,
            **({} if picks.quantile is None else {"quantile": picks.quantile}),
            "original_size": np.array([one.original_size for one in shown]),
            "crop": np.array([one.crop for one in shown]),
            "replaced": replaced,
            "corrupt": corrupt,
            **({"left_out": sum(stream.take_left_out() for stream in self._streams)} if self._streams else {}),
        }

    @abstractmethod
    def show(self, source: Any, row: int, seed: int, picks: SampleIndices) -> S:
        """One sample; a ``DecodeError`` where it cannot be read."""

    @abstractmethod
    def arrays(self, shown: Sequence[S]) -> Batch:
        """Return the tensors of a batch."""

    def _one(self, source: Images, row: int, seed: int, picks: SampleIndices, corrupt: list[str]) -> S:
        count = source.buckets[picks.bucket]
        for attempt in range(REPLACEMENTS):
            try:
                return self.show(source, row, seed, picks)
            except DecodeError as error:
                corrupt.append(f"{source.path}: {source.locate(row)}: {error}")
            number = slot_seeds(seed, attempt, np.zeros(1, dtype=np.int64)) % max(count, 1)
            row = int(source.in_bucket(picks.bucket, number)[0]) if count else row
        raise UsageError(f"{REPLACEMENTS} images in a row cannot be decoded, the last is {corrupt[-1]}")


class ImageReader(ReplacingReader[CroppedImage]):
    """SampleIndices -> a batch of images."""

    def arrays(self, shown: Sequence[CroppedImage]) -> Batch:
        """Pixels, channels first."""
        pixels = np.stack([one.pixels for one in shown]).transpose(0, 3, 1, 2)
        return {"image": torch.from_numpy(np.ascontiguousarray(pixels))}

    def show(self, source: Images, row: int, seed: int, picks: SampleIndices) -> CroppedImage:
        """Decode and crop one image.

        Raises:
            DecodeError: It is corrupt.
        """
        showing = self._crop_settings
        target = showing.sizes[picks.bucket]
        members, size = source.image(row)
        covered = None if showing.resize is None else (max(showing.resize, target[0]), max(showing.resize, target[1]))
        shown = crop(size, target, seed if picks.training and showing.random_crop else None, covered)
        decoded = decode(source.index.image(members), size_to_decode(size, shown, target), showing.max_pixels)
        if decoded.shape[:2] not in [tuple(-(-side // by) for side in size) for by in (1, 2, 4, 8)]:
            raise DecodeError(
                f"{decoded.shape[1]} x {decoded.shape[0]} pixels upright, but its index says {size[1]} x {size[0]}: "
                "index or prepare the corpus again"
            )
        pixels = resample(decoded, size, shown, target)
        flip, drop = uniform(seed, "flip, caption", 2) if picks.training else (1.0, 1.0)
        if flip < showing.flip:
            pixels = pixels[:, ::-1]
        captions = source.index.captions(members) or [""]
        caption = captions[choose(captions, seed if picks.training else None)]
        return CroppedImage(pixels, shown, size, "" if drop < showing.caption_dropout else caption, captions)


def describe_left_out(name: str, rows: ImageRows) -> str:
    """Return in one line how many images come from a corpus, and how many each filter leaves out."""
    reasons: dict[str, Any] = rows.left_out
    left_out = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    return f"corpus {name!r}: {len(rows)} of {len(rows.shards)} images" + (f"; left out: {left_out}" if reasons else "")
