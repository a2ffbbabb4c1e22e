"""Choice of a module's optimizer: by name, with the module's settings, or any optimizer from a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import UsageError
from ...hints import closest
from .eight_bit import AdamW8bit, EightBitOptimizer, Lion, Lion8bit, require_states
from .muon import Muon

OptimizerName = Literal["adamw", "adamw_8bit", "lion", "lion_8bit", "muon"]
OptimizerChoice: TypeAlias = OptimizerName | OptimizerCallable
"""A name, or an optimizer over parameter groups: ``{class_path: ..., init_args: ...}`` in YAML."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of a module's named optimizers.

    Lion's are derived from AdamW's: a tenth of the learning rate and ten times the weight decay, the upper end of the
    advice of Chen et al. 2023, section 5, with their betas of (0.9, 0.99).
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float

    def of(self, name: OptimizerName) -> OptimizerCallable:
        """Return the function that builds the named optimizer from parameter groups.

        Raises:
            UsageError: The name is unknown.
        """
        if name not in get_args(OptimizerName):
            raise UsageError(
                f"optimizer {name!r} is not one of {', '.join(get_args(OptimizerName))}"
                f"{closest(name, get_args(OptimizerName))}"
            )
        if name.startswith("lion"):
            lion = Lion8bit if name == "lion_8bit" else Lion
            return partial(lion, lr=self.lr / 10, betas=(0.9, 0.99), weight_decay=self.weight_decay * 10)
        kinds: dict[str, Any] = {"adamw": _fused_adamw, "adamw_8bit": AdamW8bit, "muon": Muon}
        return partial(kinds[name], lr=self.lr, betas=self.betas, eps=1e-8, weight_decay=self.weight_decay)


def make_optimizer(
    choice: OptimizerChoice,
    settings: OptimizerSettings,
    module: nn.Module,
    groups: Sequence[dict[str, Any]] | None = None,
) -> Optimizer:
    """Build a module's optimizer, with exceptions for embeddings.

    8-bit optimizers keep embeddings' states in 32 bits: the gradients of rare tokens are so much smaller than others
    that blocks would lose them (Dettmers et al. 2021, section 2.3). :class:`Muon` does not treat embeddings and output
    heads as matrices (Jordan et al. 2024).

    Args:
        choice: Optimizer that the user has chosen.
        settings: Settings of named optimizers.
        module: Module to train.
        groups: Parameter groups (default: :func:`parameter_groups`).
    """
    make = settings.of(choice) if isinstance(choice, str) else choice
    optimizer = make(parameter_groups(module) if groups is None else groups)
    embeddings = [part.weight for part in module.modules() if isinstance(part, nn.Embedding)]
    if isinstance(optimizer, EightBitOptimizer):
        optimizer.keep_32_bits(embeddings)
    elif isinstance(optimizer, Muon):
        optimizer.keep_adamw([*embeddings, *_heads(module)])
    return optimizer


def _heads(module: nn.Module) -> list[Tensor]:
    """Return the weights of the output heads of transformers models."""
    models: list[Any] = [part for part in module.modules() if hasattr(part, "get_output_embeddings")]
    heads = [model.get_output_embeddings() for model in models]
    return [head.weight for head in heads if head is not None]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return a module's trained parameters in two groups: matrices, with weight decay, and the rest, without."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def _fused_adamw(params: Any, **settings: Any) -> Optimizer:
    """Build torch's AdamW, and check loaded states, as it would notice another optimizer's only during a step."""
    optimizer = torch.optim.AdamW(params, fused=True, **settings)
    optimizer.register_load_state_dict_pre_hook(_check_states)
    return optimizer


def _check_states(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    for state in saved["state"].values():
        require_states("AdamW", ("exp_avg", "exp_avg_sq"), state)


STAGES = OptimizerSettings(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
"""For Stages A and C: torch's AdamW(lr) as in the authors' scripts, except that only matrices decay."""

STAGE_B = OptimizerSettings(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
"""For Stage B, as in the authors' script for its first version; the script for the paper's was not published."""
