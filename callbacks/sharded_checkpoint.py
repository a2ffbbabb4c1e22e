"""Checkpoints as folders that processes write and read together: whole or not at all, and nothing in them is executed.

A folder holds what ``torch.distributed.checkpoint`` writes (a file of tensors from each process, and ``.metadata``,
which says where each part of each tensor lies), and ``meta.pt`` with everything that is no tensor of the module or of
an optimizer, as Lightning's own sharded checkpoints do. It is written beside its final place under a hidden name,
synced, and renamed when every process has finished.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from .. import UsageError
from .fsdp_optimizer import by_names
from .shard_files import SafeReader, Shapes, exchange, fsync, is_sharded, read_meta, require_files, shapes
from .shard_slices import like_parameter, local_part

Checkpoint = dict[str, Any]
SHARDED = "sharded"
"""Key in ``meta.pt``: which keys of the checkpoint are tensors by name, and optimizers' groups."""


def save_checkpoint(checkpoint: Checkpoint, target: Path) -> None:
    """Writes a checkpoint; every process has to call it.

    Args:
        checkpoint: Lightning's, with DTensors where tensors are sharded.
        target: The folder that appears; what was there before is replaced in one step.

    Raises:
        UsageError: It cannot be written; what was there before still is.
    """
    tensors, meta = split(checkpoint)
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    temporary = target.parent / f".{target.name}.{_same_everywhere(secrets.token_hex(4))}.tmp"
    problem = ""
    if first:
        problem = _begin(target, temporary)
    _raise_everywhere(problem, target)
    try:
        save(tensors, storage_writer=FileSystemWriter(str(temporary), sync_files=True))
    except (CheckpointException, OSError, RuntimeError) as error:
        problem = _reason(error)
    if first:
        problem = problem or _finish(meta, temporary, target)
        shutil.rmtree(temporary, ignore_errors=True)
    _raise_everywhere(problem, target)


def split(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Checkpoint]:
    """What processes write together, by names within the checkpoint, and the rest, without any shard in it."""
    meta, keys = dict(checkpoint), []
    tensors: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        if key == "state_dict" or _is_sharded_state(value):
            keys.append(key)
            tensors |= {f"{key}.{name}": tensor for name, tensor in meta.pop(key).items()}
    optimizers = []
    for index, state in enumerate(meta.pop("optimizer_states", [])):
        plain = {name: dict(of_one) for name, of_one in state["state"].items()}
        for name, of_one in state["state"].items():
            held = {key: value for key, value in of_one.items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer_{index}.state.{name}.{key}": plain[name].pop(key) for key in held}
        optimizers.append({"state": plain, "param_groups": state["param_groups"]})
    meta[SHARDED] = {"keys": keys, "optimizers": optimizers}
    return tensors, tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), meta)


def load_checkpoint(path: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> Checkpoint:
    """Reads a checkpoint into a sharded module; every process has to call it.

    Args:
        path: A folder, of any number of processes, or an unsharded file.
        module: Whose tensors are read in place.
        optimizers: Whose states are asked for, none where nothing is to be trained.

    Returns:
        Lightning's checkpoint. ``optimizer_states`` are by parameter name; tensors that go with a parameter are sharded
        as it is.

    Raises:
        UsageError: Not whole, of another model, or without the states of the optimizers.
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
    """A sharded checkpoint with whole tensors, in one process that need not belong to any others.

    Args:
        path: The folder.
        optimizers: Whether optimizers' states are read too.

    Raises:
        UsageError: It is not whole.
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
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is meant
        load(wanted, storage_reader=SafeReader(str(path)), no_dist=True)
    return meta | result


def describe_checkpoint(path: Path) -> Checkpoint:
    """A sharded checkpoint without the values of its tensors, which lie on the meta device.

    Raises:
        UsageError: It is not whole.
    """
    meta, there = read_meta(path), shapes(path)
    require_files(path)
    sharded = meta.pop(SHARDED, {"keys": ["state_dict"], "optimizers": []})
    described = {key: there.get(key, {}) for key in sharded["keys"]}
    return meta | described | ({"optimizer_states": sharded["optimizers"]} if sharded["optimizers"] else {})


def consolidate(path: Path, out: Path, prefix: str = "") -> int:
    """Writes the module's tensors of a checkpoint, sharded or not, as one safetensors file.

    Args:
        path: The checkpoint.
        out: The file; it appears whole or not at all.
        prefix: Only tensors whose names begin so, named without it: ``"model."`` for what
            ``CausalLM(init_from=...)`` reads.

    Returns:
        How many tensors.

    Raises:
        UsageError: There is no tensor of such a name, or ``out`` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already: choose another name")
    content = read_checkpoint(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
    state = content["state_dict"].items()
    # Tied tensors are one memory in a file of Lightning's, which safetensors refuses.
    kept = {name.removeprefix(prefix): tensor.clone() for name, tensor in state if name.startswith(prefix)}
    if not kept:
        raise UsageError(f"{path} holds no tensor that begins with {prefix!r}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    save_file(kept, temporary, metadata={"format": "pt"})
    os.replace(temporary, out)
    return len(kept)


def remove_checkpoint(path: Path) -> None:
    """Takes a folder or file away: hidden first, so that a part of it is never taken for a checkpoint."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    hidden = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def require_same(own: Mapping[str, Tensor], there: Mapping[str, Tensor], path: Path) -> None:
    """Refuses a checkpoint of another model.

    Raises:
        UsageError: Names tensors that are missing, unexpected or of another shape.
    """
    shared = {id(tensor.untyped_storage()) for name, tensor in own.items() if name in there and not _sharded(tensor)}
    missing = [n for n, t in own.items() if n not in there and (_sharded(t) or id(t.untyped_storage()) not in shared)]
    unexpected = [name for name in there if name not in own]
    if missing or unexpected:
        first = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}"
        raise UsageError(
            f"{path} is of another model: it {first}; {len(missing)} tensors are missing, {len(unexpected)} unexpected"
        )
    for name, tensor in there.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"{path} is of another model: {name} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(own[name].shape)}"
            )


def _optimizer_templates(
    kept: Sequence[Checkpoint], there: Shapes, parameters: Mapping[str, Tensor], path: Path
) -> list[tuple[Checkpoint, dict[str, Tensor]]]:
    """Each optimizer's state with room for its tensors, and these by their names in the checkpoint."""
    if not kept:
        raise UsageError(f"{path} holds weights only, no run to go on: begin with them by init_from")
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
    """An unsharded checkpoint: every process maps the file and takes its parts."""
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
        raise UsageError(f"{path} holds weights only, no run to go on: begin with them by init_from")
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


def _is_sharded_state(value: Any) -> bool:
    """A dict of nothing but tensors, some of them shards."""
    if not isinstance(value, dict) or not value or not all(isinstance(entry, Tensor) for entry in value.values()):
        return False
    return any(isinstance(entry, DTensor) for entry in value.values())


def _sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def _begin(target: Path, temporary: Path) -> str:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(".*.tmp"):  # of saves and removals that were killed
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        return _reason(error)
    return ""


def _finish(meta: Checkpoint, temporary: Path, target: Path) -> str:
    try:
        with (temporary / "meta.pt").open("wb") as file:
            torch.save(meta, file)
            file.flush()
            os.fsync(file.fileno())
        fsync(temporary)
        exchange(temporary, target)
        fsync(target.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
        return _reason(error)
    return ""


def _same_everywhere(value: str) -> str:
    values = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def _raise_everywhere(problem: str, target: Path) -> None:
    """Raises in all processes what the first one met: none is left waiting for the others."""
    problem = _same_everywhere(problem)
    if problem:
        raise UsageError(f"checkpoint {target} cannot be written: {problem}")


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


__all__ = [
    "consolidate",
    "describe_checkpoint",
    "is_sharded",
    "load_checkpoint",
    "read_checkpoint",
    "remove_checkpoint",
    "save_checkpoint",
]
