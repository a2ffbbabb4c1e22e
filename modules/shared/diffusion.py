"""Base class of the diffusion stages: validation by intervals of time, frozen parts, the optimizer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from ... import UsageError
from ..networks import describe
from ..optimizers.choice import STAGES, OptimizerChoice, OptimizerSettings, make_optimizer
from .batches import Batch, uniforms
from .frozen import Frozen
from .image_metrics import CorpusMeans, log_means
from .monitored import MeasuredByCorpus, WatchedModule

BUCKETS = 5
"""Number of intervals of t for which validation losses are logged separately."""


class DiffusionStage(MeasuredByCorpus, WatchedModule):
    """A diffusion model trained on the outputs of frozen networks for captioned images.

    Subclasses pass losses to :meth:`accumulate` in their ``validation_step``. Their means are logged per corpus, and
    over all corpora as ``<stage>/loss_at/<interval of t>``.

    Args:
        optimizer: Optimizer of all trained parameters.
        max_grad_norm: Norm to clip gradients to, as in :class:`WatchedModule`.
        max_loss_weight: Largest weight of a loss; weights are 1 / snr(t) up to it.

    Raises:
        UsageError: ``max_loss_weight`` is below 1.
    """

    optimizer_settings: ClassVar[OptimizerSettings] = STAGES
    flops_formula = "3 x forward passes (1 x of frozen parts)"

    def __init__(
        self, optimizer: OptimizerChoice, max_grad_norm: float | None = 1.0, max_loss_weight: float = 1.0
    ) -> None:
        super().__init__(max_grad_norm)
        if max_loss_weight < 1:
            raise UsageError(f"max_loss_weight {max_loss_weight} must be at least 1, which means no weighting")
        self.max_loss_weight = max_loss_weight
        self.optimizer = optimizer
        self._means = CorpusMeans()

    @abstractmethod
    def frozen_parts(self) -> dict[str, Frozen[Any] | None]:
        """Return the frozen networks, or None if absent, by the name of the argument that sets them."""

    def quantiles(self, batch: Batch, drawn: Tensor) -> Tensor:
        """Return a number in [0, 1) per sample, (n,), for its training time; ``drawn`` if a batch has none.

        A data module's ``quantile`` is evenly spread over the global batch. Losses vary more with t than with the
        image, so the gradient of a batch that covers all times is far less noisy.
        """
        given = batch.get("quantile")
        return drawn if given is None else torch.as_tensor(given, dtype=drawn.dtype).to(drawn.device)

    def validation_times(self, batch: Batch, count: int, randomness: list[Generator] | None) -> tuple[Tensor, Tensor]:
        """Return the interval of t, and t, of each of ``count`` samples, (count,), equal at every validation."""
        rows = torch.as_tensor(batch.get("row", range(count)), device=self.device)
        [within] = uniforms(randomness, count, 1, self.device)
        bucket = rows % BUCKETS
        return bucket, ((bucket + within) / BUCKETS).clamp_min(0.001)

    def accumulate(self, corpus: int, losses: Tensor, errors: Tensor, bucket: Tensor, counted: Tensor) -> None:
        """Add each sample's loss to its corpus's mean, and its error to the mean of its interval of t."""
        self._means.add("loss", corpus, losses, counted)
        for index in range(BUCKETS):
            self._means.add(f"loss_at/{index}", 0, errors, counted & (bucket == index))

    def _log_corpora(self, stage: str, loaders: Any) -> None:
        means = self._means.reduce(self.trainer.strategy)
        for index in range(BUCKETS):
            if (mean := means.pop((f"loss_at/{index}", 0), None)) is not None:
                self.log(f"{stage}/loss_at/{index / BUCKETS:.1f}-{(index + 1) / BUCKETS:.1f}", mean)
        log_means(self, means, stage, loaders)

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer of all trained parameters; weight decay, if any, applies only to matrices."""
        return make_optimizer(self.optimizer, self.optimizer_settings, self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add descriptions of the networks, and the fingerprints and sources of the frozen ones."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["networks"] = describe(self)
        checkpoint["frozen"] = {name: part.state() for name, part in self.frozen_parts().items() if part is not None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint was trained with the same frozen parts."""
        for name, part in self.frozen_parts().items():
            if part is not None:
                part.check(checkpoint.get("frozen", {}).get(name), name)
