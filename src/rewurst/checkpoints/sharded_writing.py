"""Write checkpoints as folders, all processes together: completely or not at all, and safe to load.

A folder contains the files of ``torch.distributed.checkpoint`` (one with tensors per process, and ``.metadata`` with
the place of each part of each tensor) and ``meta.pt`` with everything else, as in Lightning's own sharded checkpoints.
It is written next to its final place under a hidden name, synced, and renamed when every process has finished.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from .. import UsageError
from ..files import replacing, sync_folder
from .sharded_files import LEFTOVERS, exchange, tidy
from .sharded_reading import SHARDED, Checkpoint, read_checkpoint


def save_checkpoint(checkpoint: Checkpoint, target: Path) -> None:
    """Write a checkpoint; every process has to call this.

    Args:
        checkpoint: Lightning's checkpoint, in which sharded tensors are DTensors.
        target: Folder to write; an existing one is replaced in one step.

    Raises:
        UsageError: The folder cannot be written; an existing one is kept.
    """
    tensors, meta = split(checkpoint)
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    if not first:  # of unsharded tensors the first process's are saved: BatchNorm's statistics differ
        tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
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
    """Split a checkpoint into the tensors written by all processes, by name, and the rest without shards."""
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


def consolidate(path: Path, out: Path, prefix: str = "") -> int:
    """Write the module's tensors of a checkpoint, sharded or not, to one safetensors file.

    Args:
        path: Checkpoint, a file or a folder of shards.
        out: Safetensors file to write, completely or not at all.
        prefix: Prefix of the names to keep, which is removed: ``model.`` for ``CausalLM(init_from=...)``.

    Returns:
        The number of tensors.

    Raises:
        UsageError: No tensor has the prefix, or ``out`` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already: choose another name")
    content = read_checkpoint(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
    state = content["state_dict"].items()
    # Tied tensors share memory in Lightning's files, which safetensors refuses.
    kept = {name.removeprefix(prefix): tensor.clone() for name, tensor in state if name.startswith(prefix)}
    if not kept:
        raise UsageError(f"{path} has no tensor whose name begins with {prefix!r}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        save_file(kept, file.name, metadata={"format": "pt"})
    return len(kept)


def remove_checkpoint(path: Path) -> None:
    """Remove a folder or file; a folder is hidden first, so that part of it is never taken for a checkpoint."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    hidden = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _is_sharded_state(value: Any) -> bool:
    """Return whether a value is a dict of tensors, some of them sharded."""
    if not isinstance(value, dict) or not value or not all(isinstance(entry, Tensor) for entry in value.values()):
        return False
    return any(isinstance(entry, DTensor) for entry in value.values())


def _begin(target: Path, temporary: Path) -> str:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(LEFTOVERS):
            tidy(leftover)
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
        sync_folder(temporary)
        exchange(temporary, target)
        sync_folder(target.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
        return _reason(error)
    return ""


def _same_everywhere(value: str) -> str:
    values = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def _raise_everywhere(problem: str, target: Path) -> None:
    """Raise the first process's problem in all processes, so that none keeps waiting for the others."""
    problem = _same_everywhere(problem)
    if problem:
        raise UsageError(f"checkpoint {target} cannot be written: {problem}")


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
