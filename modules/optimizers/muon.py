"""Muon: one optimizer with orthogonalized steps for matrices and AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ... import UsageError
from ...dtensor import local_part
from .eight_bit import Betas, State, adamw_step, require_states

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024): singular values end in [0.7, 1.2]."""

TOGETHER = 2**22
"""Number of elements of equally shaped matrices to multiply at a time; batching speeds up small matrices."""


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for matrices and AdamW for the rest, with learning rates of AdamW's scale for both.

    A matrix's step is its momentum with all singular values brought near 1, times 0.2 sqrt(max(rows, columns)), which
    matches the size of AdamW's steps (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2). Convolution
    kernels count as matrices, with a row per index of their first dimension. AdamW handles vectors, depthwise kernels,
    anything else with a single row or column, and parameters passed to :meth:`keep_adamw`, which should be embeddings
    and language models' output heads (rewurst's modules do this). A matrix has one state instead of AdamW's two.

    Under FSDP states stay sharded, and every process computes the directions of whole matrices: the result is correct,
    but the arithmetic per process does not shrink with more processes.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of AdamW's moments.
        eps: Number added to the root of AdamW's second moment.
        weight_decay: Decoupled weight decay of all parameters.
        momentum: Decay rate of the matrices' Nesterov momentum.
        matrix_lr_scale: Factor by which ``lr`` is multiplied for matrices.
        iterations: Number of Newton-Schulz iterations.

    Raises:
        UsageError: A number is out of range, or a loaded state belongs to a different optimizer.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        matrix_lr_scale: float = 1.0,
        iterations: int = 5,
    ) -> None:
        for name, value, valid in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("matrix_lr_scale", matrix_lr_scale, matrix_lr_scale >= 0),
            ("iterations", iterations, iterations >= 1),
        ):
            if not valid:
                raise UsageError(
                    f"Muon: {name} {value} must be at least 0, betas and momentum below 1 too, iterations at least 1"
                )
        self._adamw: set[Tensor] = set()
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        # With "fused", torch restores AdamW's step count on the parameter's device.
        more = {"matrix_lr_scale": matrix_lr_scale, "iterations": iterations, "fused": True}
        super().__init__(params, defaults | more)
        self.register_load_state_dict_pre_hook(_check_states)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy, including which parameters AdamW keeps."""
        return super().__getstate__() | {"_adamw": self._adamw}

    def keep_adamw(self, parameters: Iterable[Tensor]) -> None:
        """Let AdamW handle these parameters, whatever their shape; call it before the first step."""
        self._adamw |= set(parameters)

    def is_orthogonal(self, parameter: Tensor) -> bool:
        """Return whether Muon rather than AdamW handles a parameter."""
        return parameter.ndim >= 2 and min(parameter.shape[:2]) > 1 and parameter not in self._adamw

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Perform one step and return the closure's result."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    self.state[parameter] = self._fresh(parameter)
            self._step_matrices(group, [parameter for parameter in trained if self.is_orthogonal(parameter)])
            self._step_others(group, [parameter for parameter in trained if not self.is_orthogonal(parameter)])
        return loss

    def _fresh(self, parameter: Tensor) -> State:
        if self.is_orthogonal(parameter):
            return {"momentum_buffer": torch.zeros_like(parameter)}
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=parameter.device), **moments}

    def _step_matrices(self, group: Mapping[str, Any], matrices: list[Tensor]) -> None:
        of_shape: dict[Any, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            of_shape[matrix.shape, matrix.dtype, matrix.device].append(matrix)
        for (shape, *_), alike in of_shape.items():
            count = max(1, TOGETHER // max(1, shape.numel()))
            for first in range(0, len(alike), count):
                self._step_alike(group, alike[first : first + count])

    def _step_alike(self, group: Mapping[str, Any], matrices: list[Tensor]) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        directions = orthogonalise(torch.stack([_whole(one).flatten(1) for one in ahead]), group["iterations"])
        lr, size = float(group["lr"]) * group["matrix_lr_scale"], 0.2 * math.sqrt(max(directions.shape[1:]))
        for matrix, direction in zip(matrices, directions, strict=True):
            held = local_part(matrix)
            held.mul_(1 - lr * group["weight_decay"])
            held.add_(local_part(matrix, direction.view(matrix.shape)), alpha=-lr * size)

    def _step_others(self, group: Mapping[str, Any], parameters: list[Tensor]) -> None:
        if parameters:
            gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
            states = [{name: local_part(x) for name, x in self.state[parameter].items()} for parameter in parameters]
            adamw_step(group, [local_part(parameter) for parameter in parameters], gradients, states)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Bring all singular values of ``matrices`` (n, rows, columns) near 1, by Newton-Schulz iterations.

    Each iteration applies 3.4445 s - 4.775 s^3 + 2.0315 s^5 to the singular values, which are at most 1 after division
    by the matrix's norm. The computation is in bfloat16 on accelerators and in float32 on CPUs.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if x.device.type not in ("cpu", "meta"):
        x = x.bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype).contiguous()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check_states(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    assert isinstance(optimizer, Muon)
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, own, strict=False):
        if state := saved["state"].get(number):
            moments = ("momentum_buffer",) if optimizer.is_orthogonal(parameter) else ("exp_avg", "exp_avg_sq")
            require_states("Muon", moments, state)
