"""Weights to begin with, from any layout. Nothing that is loaded is executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ... import UsageError
from ...checkpoints.sharded_files import is_sharded
from ..networks.weight_files import read_file
from .building import build, same_values, some, tied_names, untie

State = Mapping[str, Tensor]
UNTIE = "set tie_word_embeddings: false in the model's settings"


def load_initial_weights(model: nn.Module, source: str) -> None:
    """Copy weights into a model, whatever layout they come in.

    A source whose output head differs from its embeddings unties those of the model, and one line says so.

    Args:
        model: The model that gets them.
        source: A Hugging Face folder or hub name (``name@revision`` for a revision), a Lightning checkpoint (a
            ``.ckpt`` file, or a folder of shards) or a safetensors file.

    Raises:
        UsageError: Names of the tensors that are missing, unexpected or of another shape.
    """
    path = Path(source)
    if path.suffix == ".ckpt" or is_sharded(path):
        state = lightning_state(read_file(path), path)
    elif path.suffix == ".safetensors":
        state = read_file(path)
    else:
        state = build(source).state_dict()
    fill(model, state, f"init_from {source}")


def fill(model: nn.Module, state: State, where: str) -> None:
    """Copy a complete state into a model, and untie its head if the state has a head of its own.

    Raises:
        UsageError: Names of the tensors that are missing, unexpected or of another shape; it begins with ``where``.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for name, other in _contradicted(model, state).items():
        if head is None or model.get_parameter(name) is not head.weight:
            raise UsageError(f"{where}: {name} and {other} differ, which the model ties: {UNTIE}")
        untie(model)
        break
    check_weights(model.state_dict(), state, where)
    model.load_state_dict(dict(state), strict=False)


def lightning_state(checkpoint: Mapping[str, Any], path: Path) -> State:
    """Return the weights of ``module.model`` in a Lightning checkpoint, by the model's own names."""
    if "state_dict" not in checkpoint:
        raise UsageError(f"{path} is not a Lightning checkpoint: it has {some(sorted(checkpoint))}, not state_dict")
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


def check_weights(own: State, state: State, where: str) -> None:
    """Compare names and shapes, which tied tensors may leave out.

    Raises:
        UsageError: Names of the tensors that are missing, unexpected or of another shape, or tensors that the model
            ties and the state does not; it begins with ``where``.
    """
    ties = _ties(own)
    missing = sorted(
        name for name in own.keys() - state.keys() if not any(other in state for other in ties.get(name, ()))
    )
    unexpected = sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise UsageError(f"{where}: weights of another model, missing {some(missing)}, unexpected {some(unexpected)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
            )
    for name, others in ties.items():
        for other in others:
            if name in state and other in state and not same_values(state[name], state[other]):
                raise UsageError(f"{where}: {name} and {other} differ, which the model ties: {UNTIE}")


def _contradicted(model: nn.Module, state: State) -> dict[str, str]:
    """Return tied weights that a state holds with other values than the one that they are tied to."""
    return {
        name: other
        for name, other in tied_names(model).items()
        if name in state and other in state and not same_values(state[name], state[other])
    }


def _ties(own: State) -> dict[str, list[str]]:
    """Return the names of tensors that share their memory with others, and those others' names."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in own.items():
        if tensor.device.type != "meta" and tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return {name: [other for other in group if other != name] for group in groups.values() for name in group}
