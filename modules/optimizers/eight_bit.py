"""AdamW and Lion with states of 8 bits per element, on one device or sharded over many.

bitsandbytes does the arithmetic (CPU, CUDA, ROCm and XPU). This file adds steps on a process's part of a sharded
parameter, and checkpoints in the format of 32-bit optimizers: they load with any number of processes, and between runs
with 8-bit and 32-bit states in both directions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from ... import UsageError
from ...dtensor import local_part
from .block_quantisation import count_blocks, decode, encode, table

State = dict[str, Any]
Betas = tuple[float, float]
DEVICES = ("cpu", "cuda", "xpu")
"""Device types for which bitsandbytes has kernels for 8-bit states."""


class EightBitOptimizer(Optimizer):
    """Base class of AdamW and Lion with 8-bit states, stored as 32-bit states in checkpoints.

    Tensors with fewer than ``min_8bit_size`` elements (counting all parts of a sharded tensor) and those passed to
    :meth:`keep_32_bits` have ordinary states. ``state_dict`` contains float32 numbers in host memory, under the names
    that ``torch.optim`` uses, sharded like their parameter. Resuming is exact to the bit if each process has the same
    parts as before; otherwise block boundaries move, and states are rounded once.

    Subclasses give bitsandbytes' name of the algorithm, and their states' names with whether they can be negative.
    """

    algorithm: ClassVar[str]
    moments: ClassVar[dict[str, bool]]
    min_8bit_size: float = 4096

    def __init__(self, params: ParamsT, lr: float, betas: Betas, eps: float, weight_decay: float) -> None:
        for name, value, valid in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not valid:
                raise UsageError(f"{type(self).__name__}: {name} {value} must be at least 0, betas below 1 too")
        self._kept: set[Tensor] = set()
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        if self.min_8bit_size < math.inf:
            _require_bitsandbytes(type(self).__name__)

    def __getstate__(self) -> State:
        """Return the state for a copy, including which parameters keep 32-bit states."""
        return super().__getstate__() | {"_kept": self._kept}

    def keep_32_bits(self, parameters: Iterable[Tensor]) -> None:
        """Give these parameters ordinary states, whatever their size; call it before the first step."""
        self._kept |= set(parameters)

    def in_8_bits(self, parameter: Tensor) -> bool:
        """Return whether a parameter's states take 8 bits per element."""
        kinds = (torch.float32, torch.bfloat16, torch.float16)
        return parameter.numel() >= self.min_8bit_size and parameter not in self._kept and parameter.dtype in kinds

    def allocate(self) -> None:
        """Allocate the states of all parameters, as the first step would."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = self._fresh(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Perform one step and return the closure's result."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            whole = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = self._fresh(parameter)
                local, gradient, state = local_part(parameter), local_part(parameter.grad), self.state[parameter]
                if not self.in_8_bits(parameter):
                    whole.append((local, gradient, state))
                    continue
                state["step"] += 1
                if local.numel():  # a process may have no part of a small tensor
                    self._step_8_bits(group, local, gradient, state)
            if whole:
                self._step_32_bits(group, *(list(parts) for parts in zip(*whole, strict=True)))
        return loss

    def _step_8_bits(self, group: Mapping[str, Any], parameter: Tensor, gradient: Tensor, state: State) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        # Kernels need contiguous memory, which channels-last weights, for example, do not have.
        contiguous = parameter.contiguous()
        tables = [table(signed, parameter.device) for signed in self.moments.values()]
        optimizer_update_8bit_blockwise(
            optimizer_name=self.algorithm,
            g=gradient.to(parameter.dtype).contiguous(),
            p=contiguous,
            state1=state["exp_avg"],
            state2=state.get("exp_avg_sq"),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            beta3=0.0,  # beta3 and alpha are for AdEMAMix
            alpha=0.0,
            eps=group["eps"],
            step=state["step"],
            lr=float(group["lr"]),
            qmap1=tables[0],
            qmap2=tables[-1] if len(tables) == 2 else None,
            absmax1=state["exp_avg_scales"],
            absmax2=state.get("exp_avg_sq_scales"),
            weight_decay=group["weight_decay"],
        )
        if contiguous is not parameter:
            parameter.copy_(contiguous)

    def _step_32_bits(
        self, group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: list[State]
    ) -> None:
        raise NotImplementedError

    def _fresh(self, parameter: Tensor) -> State:
        local = local_part(parameter)
        if not self.in_8_bits(parameter):
            zeros = {name: torch.zeros_like(local) for name in self.moments}
            return {"step": torch.zeros((), device=local.device), **zeros}
        if local.device.type not in DEVICES:
            raise UsageError(
                f"{type(self).__name__}: bitsandbytes has no kernel on {local.device.type}, only on "
                f"{', '.join(DEVICES)}: use optimizer {type(self).__name__.removesuffix('8bit').lower()}"
            )
        state: State = {"step": 0}
        for name in self.moments:
            state[name] = torch.zeros(local.shape, dtype=torch.uint8, device=local.device)
            state[f"{name}_scales"] = torch.zeros(count_blocks(local.numel()), device=local.device)
        return state

    def state_dict(self) -> State:
        """Return the states in ``torch.optim``'s format, in float32 and host memory."""
        saved = super().state_dict()
        # Without these keys, torch.optim.AdamW would choose slower defaults.
        defaults = torch.optim.AdamW([torch.zeros(1)], fused=True).defaults
        saved["param_groups"] = [{**defaults, **group} for group in saved["param_groups"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        saved["state"] = {
            number: self._unpacked(parameter, self.state[parameter])
            for number, parameter in enumerate(parameters)
            if self.state.get(parameter)
        }
        return saved

    def _unpacked(self, parameter: Tensor, state: State) -> State:
        result: State = {"step": torch.as_tensor(state["step"], dtype=torch.float32).cpu()}
        for name, signed in self.moments.items():
            value = state[name]
            if value.dtype == torch.uint8:
                value = decode(value, state[f"{name}_scales"], table(signed, value.device))
            result[name] = torch.empty_like(parameter, dtype=value.dtype, device="cpu", requires_grad=False)
            local_part(result[name]).copy_(value)
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load states of this optimizer or of its 32-bit version.

        Raises:
            UsageError: The states belong to a different optimizer.
        """
        own = {"params", "initial_lr", *self.defaults}
        groups = [{k: v for k, v in group.items() if k in own} for group in state_dict["param_groups"]]
        super().load_state_dict({"state": {}, "param_groups": groups})
        numbers = [number for group in groups for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if state := state_dict["state"].get(number):
                require_states(type(self).__name__, self.moments, state)
                self.state[parameter] = self._packed(parameter, state)

    def _packed(self, parameter: Tensor, saved: State) -> State:
        state, step = self._fresh(parameter), float(saved["step"])
        state["step"] = int(step) if self.in_8_bits(parameter) else state["step"] + step
        for name, signed in self.moments.items():
            value = local_part(saved[name]).to(state[name].device)
            if not self.in_8_bits(parameter):
                state[name].copy_(value)
            elif value.numel():
                state[name], state[f"{name}_scales"] = encode(value, table(signed, value.device))
        return state


class AdamW8bit(EightBitOptimizer):
    """AdamW (Loshchilov and Hutter 2019) with 8-bit states; small tensors use torch's fused AdamW.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Number added to the root of the second moment.
        weight_decay: Decoupled weight decay.
    """

    algorithm = "adam"
    moments: ClassVar = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _step_32_bits(
        self, group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: list[State]
    ) -> None:
        adamw_step(group, parameters, gradients, states)


class Lion8bit(EightBitOptimizer):
    """Lion (Chen et al. 2023, algorithm 2) with an 8-bit state.

    Args:
        params: Parameters or groups.
        lr: Learning rate; the paper recommends a third to a tenth of AdamW's.
        betas: Interpolation factor of the update, and decay rate of the momentum.
        weight_decay: Decoupled weight decay; three to ten times AdamW's.
    """

    algorithm = "lion"
    moments: ClassVar = {"exp_avg": True}

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: Betas = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr, betas, 0.0, weight_decay)

    def _step_32_bits(
        self, group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: list[State]
    ) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        momenta = [state["exp_avg"] for state in states]
        updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-lr)
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)
        torch._foreach_add_([state["step"] for state in states], 1)


class Lion(Lion8bit):
    """Lion with a state in the parameters' precision."""

    min_8bit_size = math.inf


def adamw_step(
    group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: list[State]
) -> None:
    """Perform a step of torch's fused AdamW on plain tensors."""
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def require_states(optimizer: str, moments: Iterable[str], state: Mapping[str, Any]) -> None:
    """Check that a parameter's state belongs to this kind of optimizer.

    Raises:
        UsageError: It belongs to a different one; the message names what it has and what is needed.
    """
    held, wanted = sorted(set(state) - {"step"}), sorted(moments)
    if held != wanted:
        raise UsageError(
            f"the checkpoint's optimizer stores {' and '.join(held) or 'nothing'} per parameter, but {optimizer} needs "
            f"{' and '.join(wanted)}: keep the optimizer, or start from the weights only (init_from)"
        )


def _require_bitsandbytes(name: str) -> None:
    # On CPUs with bfloat16 it warns about a missing package for 4-bit products, which are not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{name} needs bitsandbytes, which cannot be imported here ({error}): pip install bitsandbytes, or use "
            f"optimizer {name.removesuffix('8bit').lower()}"
        ) from error
