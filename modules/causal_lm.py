"""Causal language models of transformers, trained from nothing or on from where they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .. import UsageError
from .language.building import build
from .language.document_masks import IGNORED, document_arguments, document_targets
from .language.generation import continuations, load_auto_tokenizer
from .language.head import blocks, checkpoint_activations, set_attention
from .language.hugging_face import align_tokens, write_folder
from .language.initial_weights import check_weights, load_initial_weights
from .language.limits import extend_vocabulary, require_positions_for, require_vocabulary, vocabulary_of
from .language.lora import add_adapters, merge_adapters, trained_names
from .language.objective import Losses, Objective, busiest_share, compute_losses, find_objective
from .language.probes import require_causal, require_separate_documents
from .optimizers.choice import OptimizerChoice, OptimizerSettings, make_optimizer
from .shared.flops import flops_per_token, matrix_parameters
from .shared.monitored import MeasuredByCorpus, WatchedModule

Batch = dict[str, Tensor]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


PAPERS = OptimizerSettings(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
"""Of the optimizer, in both papers (Ibrahim et al. 2024, section 5.3)."""


class CausalLM(MeasuredByCorpus, WatchedModule):
    """Any transformers causal language model as a LightningModule.

    Batches are dicts with ``input_ids`` (rows, sequence_length + 1): the model sees all but the last token and
    predicts all but the first. With a ``mask`` of the same shape it predicts only tokens for which that is true, and
    the mean of a micro-batch is over these. The loss is the mean over tokens, in nats. Where the head is an ordinary
    linear layer the logits of all tokens never exist
    (:func:`~rewurst.modules.losses.cross_entropy.linear_cross_entropy`); models that cap or scale theirs get them, and
    one line says so. Whatever further terms the model's own loss has, such as the balance of a mixture's experts, are
    part of the training loss; ``train/busiest_expert`` is the share of the choices that the busiest expert takes.

    Logs ``train/loss`` (mean over the global batch), ``train/grad_norm``, ``tokens`` (predicted so far, over all
    datasets), ``val/loss/<corpus>``, ``val/perplexity/<corpus>`` and ``val/loss/average``; validation corpora are the
    keys of the loaders' dict. Training values are logged, and looked at for being finite, at the Trainer's
    ``log_every_n_steps``: between, no step waits for the device. Before a checkpoint, a validation and the end they are
    looked at too, so that none is saved with weights that are not finite unnoticed.

    Args:
        model: Name on the hub or folder (architecture and weights), or a config as a dict with ``model_type``
            (architecture; initial weights as transformers draws them).
        init_from: Weights to begin with instead: a Hugging Face folder or hub name, a Lightning checkpoint, or a
            safetensors file. Neither optimizer nor step nor random state comes along.
        optimizer: ``adamw``, ``adamw_8bit`` (states of 2 bytes per parameter instead of 8), ``lion``, ``lion_8bit`` or
            ``muon``, with the papers' settings, or any optimizer over parameter groups. Weight decay acts on matrices
            only; embeddings and small tensors keep 32-bit states.
        max_grad_norm: Norm that gradients are clipped to, none for no clipping. ``Trainer(gradient_clip_val)`` wins.
        z_loss: Factor of ``log(Z)**2`` added to every training loss, such as 1e-4; validation leaves it out.
        document_masks: Keep the documents of a row apart: attention and positions start over after the end token of
            the data's tokenizer, and a document's first token is predicted from nothing, so not at all.
        attn_implementation: How attention is computed; by default ``"sdpa"`` where the model has it. The flash
            kinds need the package flash-attn and a GPU.
        activation_checkpointing: Recompute every n-th block in the backward pass, none by default.
        compile: Compile each block with torch.compile, when a Trainer sets the module up.
        extend_vocabulary: Give the model rows for tokens that only the tokenizer of the data has, each the mean of the
            old rows; a number such as 64 makes the new size a multiple of it.
        lora: Train low-rank adapters only: settings of ``peft.LoraConfig`` such as ``{r: 16, lora_alpha: 32}``.
            ``modules_to_save: [embed_tokens, lm_head]`` trains embeddings and head too. Checkpoints contain only what
            is trained, so the weights of ``model`` or ``init_from`` have to stay where they are.

    Raises:
        UsageError: The model is none that transformers knows, weights do not fit, the tokenizer has more tokens than
            the model, the model cannot do what is asked for.
    """

    flops_formula = "6 N + 12 L d T per token, N without what is only looked up"
    planning_arguments: ClassVar[dict[str, Any]] = {
        "init_from": None,
        "activation_checkpointing": None,
        "compile": False,
    }
    """Arguments that `rewurst plan` replaces: they change no tensor's size, or the plan varies them itself."""

    def __init__(
        self,
        model: str | dict[str, Any],
        init_from: str | None = None,
        optimizer: OptimizerChoice = "adamw",
        max_grad_norm: float | None = 1.0,
        z_loss: float = 0.0,
        document_masks: bool = False,
        attn_implementation: Attention | None = None,
        activation_checkpointing: int | None = None,
        compile: bool = False,  # noqa: A002  # the field's word
        extend_vocabulary: bool | int = False,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(max_grad_norm)
        if z_loss < 0:
            raise UsageError(f"z_loss {z_loss} must not be below 0")
        self.model: nn.Module = build(model).train()  # from_pretrained leaves it in evaluation mode, without dropout
        if init_from is not None:
            load_initial_weights(self.model, init_from)
        self.lora = lora
        self._base = {"model": model, "init_from": init_from}
        if attn_implementation is not None:
            set_attention(self.model, attn_implementation)
        if activation_checkpointing is not None:
            checkpoint_activations(self.model, activation_checkpointing)
        require_causal(self.model)
        if lora is not None:
            add_adapters(self.model, lora)
        if document_masks:
            require_separate_documents(self.model)
        if extend_vocabulary < 0:
            raise UsageError(f"extend_vocabulary {extend_vocabulary} must be true, or the multiple to extend to")
        self.tokenizer_name = next((name for name in (model, init_from) if _may_have_a_tokenizer(name)), None)
        self.optimizer = optimizer
        self.z_loss = z_loss
        self.document_masks = document_masks
        self.end_token: int | None = getattr(self.model.config, "eos_token_id", None)
        self.tokens = 0
        self._to_compile = blocks(self.model) if compile else []
        self.extend_vocabulary = extend_vocabulary
        self._objective: Objective | None = None
        self._busiest: Tensor | None = None
        self._window_tokens = 0
        self._sums: dict[int, Tensor] = {}

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can see, none where its config does not say."""
        config: Any = self.model.config.get_text_config()  # type: ignore[union-attr,operator]
        return getattr(config, "max_position_embeddings", None)

    def export(self, folder: Path, tokenizer: Path) -> None:
        """Write the model and a tokenizer as a folder that transformers loads.

        Args:
            folder: Folder to write; one that is there is replaced.
            tokenizer: Folder of the tokenizer.

        Raises:
            UsageError: The weights are spread over processes.
        """
        if any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            raise UsageError("the weights are spread over processes: use `rewurst export hf CHECKPOINT OUT`")
        words, data = load_auto_tokenizer(tokenizer), self.trainer.datamodule  # type: ignore[attr-defined]
        model = self.model
        if self.lora is not None:
            model = copy.deepcopy(self.model)
            merge_adapters(model)
        around = (getattr(data, "end_token", None), getattr(data, "begin_tokens", None))
        align_tokens(model, words, *around)
        write_folder(model, words, folder, *around)

    def setup(self, stage: str) -> None:
        """Check that the model knows every token of the data, and how its loss can be computed."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if (tokens := getattr(datamodule, "vocab_size", None)) is not None:
            require_vocabulary(self.model, tokens, self._may_extend)
        if (length := getattr(datamodule, "sequence_length", None)) is not None:
            require_positions_for(self.model, length)
        self.end_token = getattr(datamodule, "end_token", self.end_token)
        if self.document_masks and not isinstance(self.end_token, int):
            raise UsageError(
                f"document_masks: neither {type(datamodule).__name__} nor the model's config says which token ends a "
                "document: give the config an eos_token_id"
            )
        super().setup(stage)
        self._find_objective()
        while self._to_compile:
            self._to_compile.pop().compile()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of token ids (batch, length)."""
        logits: Tensor = self.model(**self._arguments(input_ids), use_cache=False).logits
        return logits

    def token_losses(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Cross-entropy (batch, length - 1) in nats of every token but the first, from ids (batch, length).

        It is 0 for tokens that ``mask``, (batch, length), leaves out, and with ``document_masks`` where a document
        begins.
        """
        return self._losses(input_ids[:, :-1], self._targets(input_ids, mask), "none").losses

    def loss(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of ids (batch, length): the mean of the tokens' losses and every further term.

        These are the z-loss and what the model itself defines, such as the balance of a mixture's experts. Tokens that
        ``mask``, (batch, length), leaves out are read but not predicted, and do not count in the mean.
        """
        targets = self._targets(input_ids, mask)
        losses, router_logits = self._losses(input_ids[:, :-1], targets, "mean", training=True)
        self._busiest = busiest_share(self.model, router_logits)
        return losses

    def flops(self, batch: Batch) -> float | None:
        """Return the FLOPs of a training step on a micro-batch, or None for models with experts.

        6 N + 12 L d T per token. N counts the parameters that are multiplied: not an input embedding of its own, which
        is only looked up and is 22 % of Pythia-70m's parameters (the papers' tables of throughput count it).
        """
        rows, length = batch["input_ids"].shape
        config: Any = self.model.config.get_text_config()  # type: ignore[union-attr,operator]
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            return None  # a token passes some of the parameters
        shape = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
        return rows * (length - 1) * flops_per_token(self._matrix_parameters, *shape, length - 1)

    @cached_property
    def _matrix_parameters(self) -> int:
        return matrix_parameters(self.model)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of a micro-batch."""
        input_ids = batch["input_ids"]
        self._window_tokens += len(input_ids) * (input_ids.shape[1] - 1) * self.trainer.world_size
        return self.record(self.loss(input_ids, batch.get("mask")), batch)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Count the tokens of the whole global batch, then record its loss."""
        self.tokens += self._window_tokens
        self._window_tokens = 0
        super().on_before_optimizer_step(optimizer)

    def log_latest(self) -> None:
        """Log the latest loss and norm, and the tokens so far."""
        super().log_latest()
        self.log("tokens", float(self.tokens), batch_size=1)
        if self._busiest is not None:
            self.log("train/busiest_expert", self._busiest, batch_size=1, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sum losses and tokens of a corpus, so that the mean does not depend on batches or ranks."""
        input_ids = batch["input_ids"]
        targets = self._targets(input_ids, batch.get("mask"))
        losses = self._losses(input_ids[:, :-1], targets, "none").losses.double().sum(1)
        tokens = (targets != IGNORED).sum(1)
        valid = batch.get("valid", torch.ones_like(tokens, dtype=torch.bool))
        sums = torch.stack([losses.where(valid, 0).sum(), tokens.where(valid, 0).sum().double()])
        self._sums[dataloader_idx] = self._sums.get(dataloader_idx, torch.zeros_like(sums)) + sums

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Cross-entropy of every token, (rows, sequence_length), without rows that only fill up."""
        losses = self.token_losses(batch["input_ids"], batch.get("mask"))
        return losses[batch["valid"]] if "valid" in batch else losses

    def continue_text(self, prompts: Sequence[str], max_new_tokens: int = 50, temperature: float = 0.8) -> list[str]:
        """Continuations of prompts, for :class:`~rewurst.callbacks.LogText`, with the tokenizer of the data."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        folder = getattr(data, "tokenizer_folder", None)
        if not folder:
            raise UsageError("LogText: the data module knows no tokenizer_folder: prompts cannot be told as tokens")
        tokens: dict[str, Any] = {name: getattr(data, name, None) for name in ("end_token", "begin_tokens")}
        return continuations(self.model, folder, prompts, max_new_tokens, temperature, **tokens)

    def configure_optimizers(self) -> Optimizer:
        """Return the optimizer over two groups: matrices, which decay, and everything else, which does not."""
        return make_optimizer(self.optimizer, PAPERS, self)

    @property
    def _may_extend(self) -> bool | int:
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        if self.lora is not None and self.extend_vocabulary and not embeddings.weight.requires_grad:
            raise UsageError(
                "extend_vocabulary with lora: new rows would stay as they are; train them, lora.modules_to_save: "
                "[embed_tokens, lm_head]"
            )
        return self.extend_vocabulary

    @property
    def _saves_adapter_only(self) -> bool:
        return self.lora is not None and (isinstance(self._base["model"], str) or self._base["init_from"] is not None)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the weights, with ``lora`` those that are trained: the others are in the model's own files."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if not self._saves_adapter_only:
            return state
        trained, prefix = trained_names(self), kwargs.get("prefix", "")
        return {name: tensor for name, tensor in state.items() if name.removeprefix(prefix) in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, with ``lora`` those that are trained."""
        if self._saves_adapter_only and strict:
            check_weights(self.state_dict(), state_dict, "lora")
        return super().load_state_dict(state_dict, strict and not self._saves_adapter_only, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the count of tokens and the model's config, with which an export needs nothing else."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokens"] = self.tokens
        checkpoint["model_config"] = self.model.config.to_dict()  # type: ignore[union-attr,operator]
        if self.lora is not None:
            checkpoint["lora"] = {"settings": self.lora, "adapter_only": self._saves_adapter_only, **self._base}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count of tokens; a checkpoint of another project has none."""
        self.tokens = checkpoint.get("tokens", 0)
        self.fit_to_checkpoint(checkpoint)

    def fit_to_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the model the rows that ``extend_vocabulary`` had given it when the checkpoint was saved."""
        config = checkpoint.get("model_config") or {}
        tokens = (config.get("text_config") or config).get("vocab_size") or 0
        if self.extend_vocabulary and tokens > vocabulary_of(self.model):
            extend_vocabulary(self.model, tokens)

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

    def _find_objective(self) -> Objective:
        if self._objective is None:
            self._objective = find_objective(self.model)
            if not self._objective.plain_head:
                name = type(self.model).__name__
                rank_zero_info(f"{name} does more than a linear head: its loss is computed over all logits")
        return self._objective

    @property
    def _end(self) -> int | None:
        """The token that documents are told apart by, if they are."""
        return self.end_token if self.document_masks else None

    def _targets(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        input_ids = input_ids.long()
        targets = input_ids[:, 1:]
        if mask is not None:
            targets = targets.masked_fill(~mask[:, 1:].to(targets.device), IGNORED)
        return targets if self._end is None else document_targets(input_ids[:, :-1], targets, self._end)

    def _losses(
        self, input_ids: Tensor, targets: Tensor, reduction: Literal["none", "mean"], training: bool = False
    ) -> Losses:
        return compute_losses(
            self.model,
            self._find_objective(),
            self._arguments(input_ids),
            targets,
            z_loss=self.z_loss if training else 0.0,
            reduction=reduction,
            training=training,
        )

    def _arguments(self, input_ids: Tensor) -> dict[str, Tensor]:
        input_ids = input_ids.long()  # a loader without a Trainer gives them as they are stored
        further = {} if self._end is None else document_arguments(self.model, input_ids, self._end)
        return {"input_ids": input_ids, **further}


def _may_have_a_tokenizer(name: Any) -> bool:
    """Return whether a model's name is a folder or a hub name, and not a config or a file of weights."""
    return isinstance(name, str) and Path(name).suffix not in (".ckpt", ".safetensors")
