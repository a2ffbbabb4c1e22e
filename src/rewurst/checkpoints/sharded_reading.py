"""Read sharded checkpoints into a sharded module, or completely in one process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .. import UsageError
from ..dtensor import like_parameter, local_part
from .checksums import check_file
from .optimizer_names import by_names
from .sharded_files import SafeReader, Shapes, read_meta, require_files, shapes

Checkpoint = dict[str, Any]
SHARDED = "sharded"
"""Key in ``meta.pt`` of the names of keys with tensors by name, and of the optimizers' groups."""


def load_checkpoint(path: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> Checkpoint:
    """Read a checkpoint into a sharded module; every process has to call this.

    Args:
        path: Folder written by any number of processes, or an unsharded file.
        module: Module whose tensors are read in place.
        optimizers: Optimizers whose states to read; empty if nothing is trained.

    Returns:
        Lightning's checkpoint, with ``optimizer_states`` by parameter name; tensors that belong to a parameter are
        sharded like it.

    Raises:
        UsageError: The checkpoint is incomplete, of another model, or lacks the optimizers' states.
    """
    if path.is_file():
        return _load_file(path, module, optimizers)
    meta, there = read_meta(path), shapes(path)
    own = module.state_dict()
    require_same(own, there.get("state_dict", {}), path)
    require_files(path)
    result: Checkpoint = {"state_dict": own}
    wanted = {f"state_dict.{name}": tensor for name, tensor in own.items() if name in there["state_dict"]}
    sharded = meta.pop(SHARDED, {"keys": [], "optimizers": []})
    for key in sharded["keys"]:
        if key != "state_dict":
            result[key] = {name: like_parameter(own.get(name), shape) for name, shape in there.get(key, {}).items()}
            wanted |= {f"{key}.{name}": tensor for name, tensor in result[key].items()}
    if optimizers:
        states = _optimizer_templates(sharded["optimizers"], there, dict(module.named_parameters()), path)
        result["optimizer_states"] = [state for state, _ in states]
        for _, tensors in states:
            wanted |= tensors
    load(wanted, storage_reader=SafeReader(str(path)))
    return meta | result


def read_checkpoint(path: Path, optimizers: bool = False) -> Checkpoint:
    """Return a sharded checkpoint with whole tensors, in a single process.

    Args:
        path: Folder of the checkpoint.
        optimizers: Whether to read the optimizers' states too.

    Raises:
        UsageError: The checkpoint is incomplete.
    """
    meta, there = read_meta(path), shapes(path)
    require_files(path)
    sharded = meta.pop(SHARDED, {"keys": ["state_dict"], "optimizers": []})
    result: Checkpoint = {
        key: {name: torch.empty(shape.shape, dtype=shape.dtype) for name, shape in there.get(key, {}).items()}
        for key in sharded["keys"]
    }
    wanted = {f"{key}.{name}": tensor for key in result for name, tensor in result[key].items()}
    if optimizers:
        states = _optimizer_templates(sharded["optimizers"], there, {}, path)
        result["optimizer_states"] = [state for state, _ in states]
        wanted |= {name: tensor for _, tensors in states for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
        load(wanted, storage_reader=SafeReader(str(path)), no_dist=True)
    return meta | result


def describe_checkpoint(path: Path) -> Checkpoint:
    """Return a sharded checkpoint with tensors on the meta device, without values.

    Raises:
        UsageError: The checkpoint is incomplete.
    """
    meta, there = read_meta(path), shapes(path)
    require_files(path)
    sharded = meta.pop(SHARDED, {"keys": ["state_dict"], "optimizers": []})
    described = {key: there.get(key, {}) for key in sharded["keys"]}
    return meta | described | ({"optimizer_states": sharded["optimizers"]} if sharded["optimizers"] else {})


def require_same(own: Mapping[str, Tensor], there: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        UsageError: Tensors are missing, unexpected or of another shape.
    """
    shared = {id(tensor.untyped_storage()) for name, tensor in own.items() if name in there and not _sharded(tensor)}
    missing = [n for n, t in own.items() if n not in there and (_sharded(t) or id(t.untyped_storage()) not in shared)]
    unexpected = [name for name in there if name not in own]
    if missing or unexpected:
        first = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}"
        raise UsageError(
            f"{path} is of another model: it {first}; {len(missing)} tensors are missing, {len(unexpected)} unexpected"
        )
    for name, tensor in there.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"{path} is of another model: {name} has shape {tuple(tensor.shape)}, but the model's is "
                f"{tuple(own[name].shape)}"
            )


def _optimizer_templates(
    kept: Sequence[Checkpoint], there: Shapes, parameters: Mapping[str, Tensor], path: Path
) -> list[tuple[Checkpoint, dict[str, Tensor]]]:
    """Return each optimizer's state with empty tensors, and these by their names in the checkpoint."""
    if not kept:
        raise UsageError(f"{path} contains only weights, so there is no run to resume: pass it to init_from")
    result = []
    for index, of_one in enumerate(kept):
        states = {name: dict(state) for name, state in of_one["state"].items()}
        tensors = {}
        for full, shape in there.get(f"optimizer_{index}", {}).items():
            name, key = full.removeprefix("state.").rsplit(".", 1)
            states[name][key] = like_parameter(parameters.get(name), shape)
            tensors[f"optimizer_{index}.{full}"] = states[name][key]
        result.append(({"state": states, "param_groups": of_one["param_groups"]}, tensors))
    return result


@torch.no_grad()
def _load_file(path: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> Checkpoint:
    """Read an unsharded checkpoint: every process maps the file and takes its parts."""
    check_file(path)
    content: Checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    own, whole = module.state_dict(), content["state_dict"]
    require_same(own, whole, path)
    for name, tensor in own.items():
        if name in whole:
            local_part(tensor).copy_(local_part(tensor, whole[name]))
    for key, value in content.items():
        if key not in ("state_dict", "callbacks") and isinstance(value, dict) and value.keys() & own.keys():
            content[key] = {name: like_parameter(own.get(name), tensor, fill=True) for name, tensor in value.items()}
    content["state_dict"] = own
    if optimizers and "optimizer_states" not in content:
        raise UsageError(f"{path} contains only weights, so there is no run to resume: pass it to init_from")
    parameters = dict(module.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    for index, (optimizer, state) in enumerate(zip(optimizers, content.get("optimizer_states", []), strict=False)):
        named = by_names(
            state, [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        )
        for name, of_one in named["state"].items():
            for key, value in of_one.items():
                if isinstance(value, Tensor):
                    of_one[key] = like_parameter(parameters[name], value, fill=True)
        content["optimizer_states"][index] = named
    return content


def _sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)
