"""Store optimizer states by parameter name, independent of the number of processes and the order of groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import UsageError

State = dict[str, Any]


def refuse_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that cannot step on shards of parameters.

    Raises:
        UsageError: One of the optimizers cannot; the message names the first.
    """
    for optimizer in optimizers:
        kind = type(optimizer)
        if kind.__module__.startswith("bitsandbytes") or kind.__name__ in ("LBFGS", "SparseAdam"):
            raise UsageError(
                f"FSDP: {kind.__module__}.{kind.__name__} cannot step on shards: use torch.optim.AdamW, or AdamW8bit, "
                "Lion8bit or Muon of rewurst.modules"
            )


def named_state(optimizer: Optimizer, module: nn.Module) -> State:
    """Return ``state`` by parameter name, and ``param_groups`` with names in ``params``.

    The state is what ``Optimizer.state_dict`` returns, so optimizers with their own storage work too.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    return by_names(optimizer.state_dict(), groups)


def restore_named_state(optimizer: Optimizer, saved: Mapping[str, Any], module: nn.Module) -> None:
    """Load a state from :func:`named_state` into an optimizer.

    Raises:
        UsageError: The optimizer has other parameters, or other groups of them.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    kept = [group["params"] for group in saved["param_groups"]]
    if own != kept:
        raise UsageError(
            f"the checkpoint's optimizer has groups of {[len(group) for group in kept]} parameters and this run's "
            f"{type(optimizer).__name__} of {[len(group) for group in own]}, or others: keep the optimizer, or "
            "start from the weights only (init_from)"
        )
    numbers = {name: number for number, name in enumerate(name for group in kept for name in group)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in saved["param_groups"]]
    states = {numbers[name]: state for name, state in saved["state"].items()}
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def by_names(saved: Mapping[str, Any], names: list[list[str]]) -> State:
    """Turn a state by parameter number, as PyTorch stores it, into one by name.

    Args:
        saved: State from ``Optimizer.state_dict``.
        names: Names of the parameters of each group, in order.

    Raises:
        UsageError: The groups have other sizes.
    """
    groups = saved["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group) for group in names]:
        raise UsageError(
            f"the checkpoint's optimizer has groups of {sizes} parameters and this run's of "
            f"{[len(group) for group in names]}: keep the optimizer, or start from the weights only (init_from)"
        )
    of_number = {
        number: name
        for group, of_group in zip(groups, names, strict=True)
        for number, name in zip(group["params"], of_group, strict=True)
    }
    return {
        "state": {of_number[number]: state for number, state in saved["state"].items()},
        "param_groups": [{**group, "params": list(of_group)} for group, of_group in zip(groups, names, strict=True)],
    }


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state as ``name/key``."""
    return {
        f"{name}/{key}": value
        for name, of_one in state["state"].items()
        for key, value in of_one.items()
        if isinstance(value, Tensor)
    }
