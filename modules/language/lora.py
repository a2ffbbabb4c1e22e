"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through peft: put into a model, saved, merged and exported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ... import UsageError
from ...hints import closest

ADAPTER = "default"
"""Name of the adapter in the model's own names, which files of peft leave out."""


def add_adapters(model: Any, settings: Mapping[str, Any]) -> None:
    """Freeze a model and put adapters into its linear layers, in place.

    Args:
        model: A causal language model of transformers.
        settings: Settings of ``peft.LoraConfig``, such as ``r``, ``lora_alpha`` and ``target_modules`` (default: all
            linear layers but the head). Modules that end with a name in ``modules_to_save``, such as ``embed_tokens``
            and ``lm_head``, are trained whole.

    Raises:
        UsageError: peft is not installed, or a setting is wrong or matches nothing.
    """
    config, whole = lora_config(settings)
    if any(isinstance(parameter, FakeTensor) for parameter in model.parameters()):
        raise UsageError("lora cannot be planned, because peft needs weights: plan without it, which takes more memory")
    from peft import inject_adapter_in_model

    trained = [_modules_named(model, name) for name in whole]
    try:
        inject_adapter_in_model(config, model, ADAPTER)
    except Exception as error:  # peft raises ValueError, NotImplementedError and others
        raise UsageError(f"lora: {str(error).splitlines()[0]}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    for module in [module for modules in trained for module in modules]:
        module.requires_grad_(True)


def lora_config(settings: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Return the config of peft, and the names of modules that are trained whole.

    Raises:
        UsageError: peft is not installed, or there is no such setting.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UsageError(f"lora needs peft ({error}): pip install 'rewurst[lora]'") from None
    given = dict(settings)
    whole = given.pop("modules_to_save", None) or []
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name in given:
        if name not in known:
            raise UsageError(f"lora: {name!r} is not a setting of peft's LoraConfig{closest(name, known)}")
    given.setdefault("target_modules", "all-linear")
    try:
        return LoraConfig(task_type="CAUSAL_LM", **{k: v for k, v in given.items() if k != "task_type"}), list(whole)
    except (TypeError, ValueError) as error:
        raise UsageError(f"lora: {str(error).splitlines()[0]}") from error


def trained_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters that are trained, both names of tied ones."""
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.requires_grad}


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add each adapter to the layer that it adapts, and take it out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)  # refuses values that are not finite
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def save_adapter(state: Mapping[str, Tensor], settings: Mapping[str, Any], base: str, tied: bool, folder: Path) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        state: Trained tensors by the model's own names.
        settings: What :func:`add_adapters` was given.
        base: Folder or hub name of the model that is adapted.
        tied: Whether its embeddings are its output head.
        folder: Folder to write.
    """
    config, whole = lora_config(settings)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.modules_to_save, config.ensure_weight_tying = whole or None, tied and bool(whole)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    renamed = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in state.items()}
    save_file({name: t.detach().clone().contiguous() for name, t in renamed.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip


def _modules_named(model: nn.Module, name: str) -> list[nn.Module]:
    found = [module for path, module in model.named_modules() if path.split(".")[-1] == name or path == name]
    if not found:
        names = {path.split(".")[-1] for path, _ in model.named_modules() if path}
        raise UsageError(
            f"lora: modules_to_save {name!r} matches nothing in {type(model).__name__}{closest(name, names)}"
        )
    return found
