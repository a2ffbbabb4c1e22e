"""Causal language models of transformers, trained from nothing or on from where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .. import UsageError
from .initial_weights import build, load_initial_weights

Batch = dict[str, Tensor]


def adamw(params: ParamsT) -> Optimizer:
    """AdamW with the settings of both papers (Ibrahim et al. 2024, section 5.3), fused.

    A function and not a lambda: the command line names it in the configs that it saves.
    """
    return torch.optim.AdamW(params, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)


class CausalLM(LightningModule):
    """Any transformers causal language model as a LightningModule.

    Batches are dicts with ``input_ids`` (rows, sequence_length + 1): the model sees all but the last token and
    predicts all but the first. The loss is the mean over tokens, in nats.

    Logs ``train/loss`` (mean over the global batch), ``train/grad_norm``, ``tokens`` (predicted so far, over all
    datasets), ``val/loss/<corpus>``, ``val/perplexity/<corpus>`` and ``val/loss/average``; validation corpora are the
    keys of the loaders' dict.

    Args:
        model: Name on the hub or folder (architecture and weights), or a config as a dict with ``model_type``
            (architecture; initial weights as transformers draws them).
        init_from: Weights to begin with instead: a Hugging Face folder or hub name, a Lightning checkpoint, or a
            safetensors file. Neither optimizer nor step nor random state comes along.
        optimizer: Optimizer over parameter groups; the default is :func:`adamw` with the papers' settings. Weight
            decay acts on matrices only.
        max_grad_norm: Norm that gradients are clipped to, none for no clipping. ``Trainer(gradient_clip_val)`` wins.

    Raises:
        UsageError: The model is none that transformers knows, weights do not fit, the tokenizer has more tokens than
            the model.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        init_from: str | None = None,
        optimizer: OptimizerCallable = adamw,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__()
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise UsageError(f"max_grad_norm {max_grad_norm} must be above 0, or null for no clipping")
        self.model: nn.Module = build(model).train()  # from_pretrained leaves it in evaluation mode, without dropout
        if init_from is not None:
            load_initial_weights(self.model, init_from)
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.tokens = 0
        self._window: list[Tensor] = []
        self._window_tokens = 0
        self._sums: dict[int, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Checks that the model knows every token of the data."""
        vocab_size = getattr(self.trainer.datamodule, "vocab_size", None)  # type: ignore[attr-defined]
        known = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        if vocab_size is not None and vocab_size > known:
            raise UsageError(
                f"the tokenizer has {vocab_size} tokens and the model's vocab_size is {known}: "
                f"set model.vocab_size to at least {vocab_size}"
            )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of token ids (batch, length)."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def token_losses(self, input_ids: Tensor) -> Tensor:
        """Cross-entropy (batch, length - 1) in nats of every token but the first, from ids (batch, length)."""
        logits = self(input_ids[:, :-1])
        targets = input_ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a micro-batch."""
        loss = self.token_losses(batch["input_ids"]).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(self._not_finite("loss", loss, batch))
        self._window.append(loss.detach())
        self._window_tokens += batch["input_ids"][:, 1:].numel() * self.trainer.world_size
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the loss of the whole global batch and counts its tokens.

        Here and not at the end of the batch: callbacks save checkpoints before the module's own hook runs there.
        """
        if self._window:
            loss = torch.stack(self._window).mean()
            self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=1)
            self.tokens += self._window_tokens
            self.log("tokens", float(self.tokens), batch_size=1)
        self._window, self._window_tokens = [], 0

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the Trainer's setting or ``max_grad_norm``, logs the norm, and stops when it is not finite."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        limit = self.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        norm = nn.utils.clip_grad_norm_(self.parameters(), limit or float("inf"))  # Lightning's 0 is no clipping
        # With a loss scaler a norm that overflows is no accident: the scaler leaves that step out and scales less.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not scaled and not torch.isfinite(norm):
            raise FloatingPointError(self._not_finite("gradient norm", norm, None))
        self.log("train/grad_norm", norm, batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sums losses and tokens of a corpus, so that the mean does not depend on batches or ranks."""
        losses = self.token_losses(batch["input_ids"]).double().sum(1)
        valid = batch.get("valid", torch.ones_like(losses, dtype=torch.bool))
        tokens = valid.sum() * (batch["input_ids"].shape[1] - 1)
        sums = torch.stack([losses[valid].sum(), tokens.double()])
        self._sums[dataloader_idx] = self._sums.get(dataloader_idx, torch.zeros_like(sums)) + sums

    def on_validation_epoch_end(self) -> None:
        """Logs the mean loss of every corpus and their average."""
        self._log_corpora("val", self.trainer.val_dataloaders)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As validation, logged under ``test/``."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the mean loss of every corpus and their average."""
        self._log_corpora("test", self.trainer.test_dataloaders)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Cross-entropy of every token, (rows, sequence_length), without rows that only fill up."""
        losses = self.token_losses(batch["input_ids"])
        return losses[batch["valid"]] if "valid" in batch else losses

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over two groups: matrices, which decay, and everything else, which does not."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        others = [parameter for parameter in parameters if parameter.ndim < 2]
        return self.optimizer([{"params": matrices}, {"params": others, "weight_decay": 0.0}])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the count of tokens and the model's config, with which an export needs nothing else."""
        checkpoint["tokens"] = self.tokens
        checkpoint["model_config"] = self.model.config.to_dict()  # type: ignore[union-attr,operator]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the count of tokens over; a checkpoint of another project has none."""
        self.tokens = checkpoint.get("tokens", 0)

    def _log_corpora(self, stage: str, loaders: Any) -> None:
        names = list(loaders) if isinstance(loaders, dict) else [str(index) for index in range(len(self._sums))]
        means = {}
        for index, sums in sorted(self._sums.items()):
            total = self.trainer.strategy.reduce(sums, reduce_op="sum")
            means[names[index]] = total[0] / total[1]
        self._sums = {}
        for name, mean in means.items():
            self.log(f"{stage}/loss/{name}", mean)
            self.log(f"{stage}/perplexity/{name}", mean.exp())
        if means:
            self.log(f"{stage}/loss/average", torch.stack(list(means.values())).mean(), prog_bar=True)

    def _not_finite(self, what: str, value: Tensor, batch: Batch | None) -> str:
        locate: Callable[[Batch], str] | None = getattr(self.trainer.datamodule, "locate", None)  # type: ignore[attr-defined]
        where = f" at {locate(batch)}" if locate is not None and batch is not None else ""
        return f"{what} is {value.item()} at optimizer step {self.trainer.global_step}{where}"
