"""What stages of diffusion share as LightningModules: validation by intervals of time, frozen parts, the optimizer."""

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
"""Intervals of t that the validation loss is told apart by."""


class DiffusionStage(MeasuredByCorpus, WatchedModule):
    """A diffusion model that is trained on what frozen networks make of captioned images.

    Subclasses take in losses with :meth:`take_in` in their ``validation_step``. Logged are, for each corpus, the means
    of what was taken in, and over all corpora ``<stage>/loss_at/<interval of t>``.

    Args:
        optimizer: Of all that is trained.
        max_grad_norm: As in :class:`WatchedModule`.
        max_loss_weight: Largest value of 1 / snr(t) that losses are weighted with.

    Raises:
        UsageError: A weight below 1.
    """

    optimizer_settings: ClassVar[OptimizerSettings] = STAGES
    flops_formula = "3 x forward passes (1 x of frozen parts)"

    def __init__(
        self, optimizer: OptimizerChoice, max_grad_norm: float | None = 1.0, max_loss_weight: float = 1.0
    ) -> None:
        super().__init__(max_grad_norm)
        if max_loss_weight < 1:
            raise UsageError(f"max_loss_weight {max_loss_weight} must be at least 1, which is no weight")
        self.max_loss_weight = max_loss_weight
        self.optimizer = optimizer
        self._means = CorpusMeans()

    @abstractmethod
    def frozen_parts(self) -> dict[str, Frozen[Any] | None]:
        """Networks that are used and not trained, by the name of the argument that gives them; none where absent."""

    def quantiles(self, batch: Batch, drawn: Tensor) -> Tensor:
        """A number in [0, 1) for each sample, (n,), to make its training time of: as ``drawn`` where a batch has none.

        A data module's ``quantile`` is evenly spread over the global batch. Losses differ more by t than by picture,
        and the gradient of a batch that has all times in it is far less noisy.
        """
        given = batch.get("quantile")
        return drawn if given is None else torch.as_tensor(given, dtype=drawn.dtype).to(drawn.device)

    def validation_times(self, batch: Batch, count: int, randomness: list[Generator] | None) -> tuple[Tensor, Tensor]:
        """Interval of t and t of each of ``count`` samples, (count,): the same at every validation."""
        rows = torch.as_tensor(batch.get("row", range(count)), device=self.device)
        [within] = uniforms(randomness, count, 1, self.device)
        bucket = rows % BUCKETS
        return bucket, ((bucket + within) / BUCKETS).clamp_min(0.001)

    def take_in(self, corpus: int, losses: Tensor, errors: Tensor, bucket: Tensor, counted: Tensor) -> None:
        """Takes in each sample's loss for its corpus, and its error for its interval of t."""
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
        """One optimizer over all that is trained; weight decay, if there is any, acts on matrices only."""
        return make_optimizer(self.optimizer, self.optimizer_settings, self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps which attribute is which network, and what the frozen ones are and where they came from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["networks"] = describe(self)
        checkpoint["frozen"] = {name: part.state() for name, part in self.frozen_parts().items() if part is not None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that was trained with other frozen parts."""
        for name, part in self.frozen_parts().items():
            if part is not None:
                part.check(checkpoint.get("frozen", {}).get(name), name)
