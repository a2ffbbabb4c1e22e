"""Building transformers models, and weights to begin with from any layout. Nothing that is loaded is executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import UsageError
from ...checkpoints.sharded_files import is_sharded
from ...hints import closest, did_you_mean
from ..networks.weight_files import read_file

State = Mapping[str, Tensor]


def build(model: str | dict[str, Any]) -> nn.Module:
    """A causal language model from a hub name or folder (with its weights) or from a config (fresh weights).

    Raises:
        UsageError: An unknown ``model_type``, a wrong setting, no such folder or name.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(model, dict):
        return AutoModelForCausalLM.from_config(_config(model))  # type: ignore[no-any-return,no-untyped-call]
    _require_folder_or_name(model)
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {model!r} could not be loaded: {_first_line(error)}") from error


def load_initial_weights(model: nn.Module, source: str) -> None:
    """Copies weights into a model, whatever layout they come in.

    Args:
        model: The model that gets them.
        source: A Hugging Face folder or hub name, a Lightning checkpoint (a ``.ckpt`` file, or a folder of shards) or
            a safetensors file.

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
    check_weights(model.state_dict(), state, f"init_from {source}")
    model.load_state_dict(dict(state), strict=False)


def lightning_state(checkpoint: Mapping[str, Any], path: Path) -> State:
    """The weights of ``module.model`` in a Lightning checkpoint, by the model's own names."""
    if "state_dict" not in checkpoint:
        raise UsageError(f"{path} is no Lightning checkpoint: it holds {_some(sorted(checkpoint))}, not state_dict")
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


def check_weights(own: State, state: State, where: str) -> None:
    """Compares names and shapes, which tied tensors may leave out.

    Raises:
        UsageError: Names of the tensors that are missing, unexpected or of another shape; it begins with ``where``.
    """
    tied = {name for name, tensor in own.items() if any(tensor is not t and _shares(tensor, t) for t in own.values())}
    missing = sorted(own.keys() - state.keys() - tied)
    unexpected = sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise UsageError(f"{where}: weights of another model, missing {_some(missing)}, unexpected {_some(unexpected)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
            )


def _config(settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        hint = closest(str(model_type), CONFIG_MAPPING) or "; gpt_neox and llama are two that exist"
        raise UsageError(f"model_type {model_type!r} is unknown to transformers{hint}")
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map}  # GPT-2 calls num_hidden_layers n_layer, and knows both
    for name in settings:
        if name not in known:
            raise UsageError(f"model setting {name!r} is unknown to {model_type}{closest(name, known)}")
    return AutoConfig.for_model(model_type, **settings)


def _require_folder_or_name(model: str) -> None:
    """A path that looks like one and is not there would be asked of the hub, with a baffling answer."""
    path = Path(model)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if looks_local and not path.expanduser().is_dir():
        raise UsageError(f"model folder {model} does not exist{did_you_mean(path)}")


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.device.type != "meta"


def _some(names: list[str], most: int = 3) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
