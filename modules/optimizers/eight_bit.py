"""AdamW and Lion whose states take 8 bits an element, on one device and on the shards of many.

The arithmetic is bitsandbytes' (CPU, CUDA, ROCm and XPU). What is ours is that it steps on what a process holds of a
sharded parameter, and that checkpoints hold the states as 32-bit optimizers do: they load at any number of processes,
and in a run with 32-bit states or from one.
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
"""Where bitsandbytes has kernels for 8-bit states."""


class EightBitOptimizer(Optimizer):
    """What AdamW and Lion share: states in blocks of 8 bits, and 32-bit ones in checkpoints.

    Tensors of fewer than ``min_8bit_size`` elements (all of a sharded tensor's count) and those given to
    :meth:`keep_32_bits` have ordinary states. ``state_dict`` holds float32 numbers in the host's memory, by the names
    that ``torch.optim`` uses, sharded as their parameter is. Going on from it is going on to the bit, as long as
    processes hold the parts that they held; otherwise blocks fall elsewhere, and states are rounded once.

    Subclasses name the algorithm for bitsandbytes, and their states with whether these can be below 0.
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
        """What a copy is made of: what keeps 32 bits too."""
        return super().__getstate__() | {"_kept": self._kept}

    def keep_32_bits(self, parameters: Iterable[Tensor]) -> None:
        """Gives these parameters ordinary states, whatever their size: before the first step."""
        self._kept |= set(parameters)

    def in_8_bits(self, parameter: Tensor) -> bool:
        """Whether a parameter's states take 8 bits an element."""
        kinds = (torch.float32, torch.bfloat16, torch.float16)
        return parameter.numel() >= self.min_8bit_size and parameter not in self._kept and parameter.dtype in kinds

    def allocate(self) -> None:
        """Makes room for the states of all parameters, which the first step would do."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = self._fresh(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; returns what the closure does."""
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
                if local.numel():  # a process may hold nothing of a small tensor
                    self._step_8_bits(group, local, gradient, state)
            if whole:
                self._step_32_bits(group, *(list(parts) for parts in zip(*whole, strict=True)))
        return loss

    def _step_8_bits(self, group: Mapping[str, Any], parameter: Tensor, gradient: Tensor, state: State) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        # Kernels read memory from end to end; channels-last weights, for one, do not lie so.
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
            beta3=0.0,  # this and alpha are AdEMAMix's
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
        """States as ``torch.optim`` keeps them, in float32 and the host's memory."""
        saved = super().state_dict()
        # Keys that torch.optim.AdamW would otherwise fill in with slower choices of its own.
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
        """Takes states of this optimizer or of its 32-bit relative over.

        Raises:
            UsageError: They are another optimizer's.
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
    """AdamW (Loshchilov and Hutter 2019) with states in 8 bits; small tensors are stepped by torch's fused one.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second.
        weight_decay: Decoupled.
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
    """Lion (Chen et al. 2023, algorithm 2) with its state in 8 bits.

    Args:
        params: Parameters or groups.
        lr: Learning rate: a third to a tenth of AdamW's, as the paper has it.
        betas: Interpolation of the update, and decay of the momentum.
        weight_decay: Decoupled: three to ten times AdamW's.
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
    """Lion with its state in the parameters' precision."""

    min_8bit_size = math.inf


def adamw_step(
    group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: list[State]
) -> None:
    """AdamW's step as torch's fused kernel has it, on plain tensors."""
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
    """Refuses a parameter's state that belongs to another optimizer.

    Raises:
        UsageError: Says what it holds and what is needed.
    """
    held, wanted = sorted(set(state) - {"step"}), sorted(moments)
    if held != wanted:
        raise UsageError(
            f"the checkpoint's optimizer keeps {' and '.join(held) or 'nothing'} of a parameter and {optimizer} "
            f"{' and '.join(wanted)}: keep the optimizer, or begin with the weights alone (init_from)"
        )


def _require_bitsandbytes(name: str) -> None:
    # On CPUs with bfloat16 it asks for a package for 4-bit products, which nothing here computes.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{name} needs bitsandbytes, which cannot be imported here ({error}): pip install bitsandbytes, or use "
            f"optimizer {name.removesuffix('8bit').lower()}"
        ) from error
