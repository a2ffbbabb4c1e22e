"""Batches of the Würstchen stages: pixels, and random numbers per sample."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Generator, Tensor

Batch: TypeAlias = dict[str, Any]


def pixels(batch: Batch) -> Float[Tensor, "batch 3 h w"]:
    """Return a batch's images, converted from bytes to [0, 1]."""
    images: Tensor = batch["image"]
    return images.float() / 255 if images.dtype == torch.uint8 else images


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32, the precision that losses are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def generators(batch: Batch) -> list[Generator] | None:
    """Return a generator per sample of a batch, seeded with its ``seed``, or None if the batch has no seeds.

    They are CPU generators, so that random numbers do not depend on the device, ranks, workers or micro-batches.
    """
    if "seed" not in batch:
        return None
    return [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]


def uniforms(
    randomness: Sequence[Generator] | None, batch_size: int, count: int, device: torch.device
) -> Float[Tensor, "count batch"]:
    """Draw ``count`` numbers in [0, 1) per sample, each sample's from its own generator."""
    if randomness is None:
        return torch.rand(count, batch_size, device=device)
    return torch.stack([torch.rand(count, generator=one) for one in randomness], dim=1).to(device)
