"""Names and sizes of shards of pictures."""

from __future__ import annotations

from typing import NamedTuple

from ... import UsageError
from ...datamodules.imaging.facts import Facts

SHARD_BYTES = 2**28


def is_full(samples: int, size: int, samples_per_shard: int | None) -> bool:
    """Whether a shard of so many samples and bytes takes no more."""
    return samples >= samples_per_shard if samples_per_shard else size >= SHARD_BYTES


def image_key(sample: int) -> str:
    """Key of a sample, by its number in the corpus."""
    return f"{sample:09d}"


def image_shard_name(name: str, number: int) -> str:
    """File name of a shard."""
    return f"{name}-{number:06d}.tar"


def no_picture(folder: str) -> UsageError:
    """Return the error about a side that would be empty."""
    return UsageError(f"{folder}: no picture is left for it; give more, or another --held_out")


class ImageSample(NamedTuple):
    """A picture ready for a shard: its members, their facts, and a number in [0, 1) that only the file decides."""

    members: dict[str, bytes]
    facts: Facts
    draw: float
    side: str | None
