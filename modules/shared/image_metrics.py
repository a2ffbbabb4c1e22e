"""Similarity of reconstructions to images, and means over a corpus that do not depend on batches or ranks."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

Images: TypeAlias = Float[Tensor, "batch 3 h w"]


def psnr(images: Images, targets: Images) -> Float[Tensor, " batch"]:
    """Return the peak signal-to-noise ratio in dB of each image, after clamping to [0, 1].

    Its mean is the mean of decibels over images, not the decibels of their mean squared error.
    """
    values: Tensor = peak_signal_noise_ratio(
        images.float().clamp(0, 1), targets.float(), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return values


def ssim(images: Images, targets: Images) -> Float[Tensor, " batch"]:
    """Return each image's structural similarity (Wang et al. 2004: Gaussian window, 11 pixels, deviation 1.5)."""
    values = structural_similarity_index_measure(
        images.float().clamp(0, 1), targets.float(), data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values


def valid_samples(batch: dict[str, Tensor], like: Tensor) -> Tensor:
    """Return which samples of a batch count, (batch,); padding samples do not."""
    return batch.get("valid", torch.ones(like.shape[0], dtype=torch.bool)).to(like.device)


class CorpusMeans:
    """Means over the samples of each corpus, regardless of their batches and ranks."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}

    def add(self, name: str, corpus: int, values: Float[Tensor, " batch"], counted: Tensor) -> None:
        """Add a value per sample that ``counted`` selects. All ranks must make the same calls."""
        chosen = values.double()[counted]
        sums = torch.stack([chosen.sum(), counted.sum().double()])
        self._sums[name, corpus] = self._sums.get((name, corpus), torch.zeros_like(sums)) + sums

    def reduce(self, strategy: Strategy) -> dict[tuple[str, int], Tensor]:
        """Return the mean over all ranks by name and corpus, leaving out those without samples, and reset."""
        keys, sums = list(self._sums), list(self._sums.values())
        self._sums = {}
        if not keys:
            return {}
        reduced = strategy.reduce(torch.stack(sums), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return {key: total / count for key, (total, count) in zip(keys, reduced, strict=True) if count > 0}


def log_means(module: LightningModule, means: Mapping[tuple[str, int], Tensor], stage: str, loaders: object) -> None:
    """Log means as ``<stage>/<name>/<corpus>``, and the losses' average; the loaders' keys name the corpora."""
    names = dict(enumerate(loaders)) if isinstance(loaders, dict) else {index: str(index) for _, index in means}
    for (name, corpus), mean in means.items():
        module.log(f"{stage}/{name}/{names[corpus]}", mean)
    losses = [mean for (name, _), mean in means.items() if name == "loss"]
    if losses:
        module.log(f"{stage}/loss/average", torch.stack(losses).mean(), prog_bar=True)
