"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) for networks, using peft: add, merge, write for diffusers.

A linear layer W becomes W + scaling B A, and only A and B are trained. Checkpoints contain all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ... import UsageError
from ...hints import closest

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # attention, as in diffusers' own training scripts
SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")  # those that a merge supports
ADAPTER = "default"  # peft's name for a single adapter
FILE = "pytorch_lora_weights.safetensors"  # the file name that diffusers expects
_BASE = ".base_layer."


def add_lora(network: nn.Module, settings: Mapping[str, Any]) -> dict[str, float]:
    """Freeze a network and add adapters to its linear layers.

    Args:
        network: Network to adapt.
        settings: Settings of ``LoraConfig``: ``r`` (default: 16), ``lora_alpha`` (default: ``r``), ``lora_dropout``,
            ``target_modules`` (default: the attention layers), ``use_rslora``.

    Returns:
        The settings that a merge needs, to be stored in checkpoints.

    Raises:
        UsageError: peft is missing, a setting is unknown or out of range, or a target is not a linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise UsageError("lora needs the package peft: pip install 'rewurst[lora]'") from None
    for name in settings:
        if name not in SETTINGS:
            raise UsageError(f"lora has {name!r}, expected {', '.join(SETTINGS)}{closest(name, SETTINGS)}")
    rank = settings.get("r", RANK)
    if not isinstance(rank, int) or rank < 1:
        raise UsageError(f"lora's r is {rank!r}, expected a whole number of at least 1")
    targets = settings.get("target_modules", TARGETS)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UsageError(f"lora's target_modules are {targets!r}, expected a list of layer names")
    for name, layer in network.named_modules():  # peft adapts convolutions too, but not our channels-last ones
        if any(f".{name}".endswith(f".{target}") for target in targets) and type(layer) is not nn.Linear:
            raise UsageError(f"lora's target_modules match {name}, which is not a linear layer: leave it out")
    try:
        asked: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": TARGETS} | dict(settings)
        with unset_fake_temporarily():
            inject_adapter_in_model(LoraConfig(**asked), network, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise UsageError(f"lora cannot be added: {str(error).splitlines()[0]}") from None
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        _materialise(layer)
    return {"r": rank, "scaling": float(layers[0].scaling[ADAPTER])}


def _materialise(layer: Any) -> None:
    """Allocate a layer's adapters on the device of its base layer.

    peft moves adapters there, which the fake tensors of `rewurst plan` do not allow. So peft creates them outside of
    the fake tensor mode, on the meta device, from which it moves nothing.
    """
    base = layer.get_base_layer().weight
    for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
        part.weight = nn.Parameter(torch.empty(part.weight.shape, dtype=base.dtype, device=base.device))
    layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


def merged(state: Mapping[str, Tensor], lora: Mapping[str, float]) -> dict[str, Tensor]:
    """Return a network's tensors with the adapters merged into their layers, under the layers' plain names."""
    plain = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        stem, base, kind = name.rpartition(_BASE)
        if base and kind == "weight":
            a, b = (state[f"{stem}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
            tensor = (tensor.float() + lora["scaling"] * (b.float() @ a.float())).to(tensor.dtype)
        plain[f"{stem}.{kind}" if base else name] = tensor
    return plain


def write_lora(folder: Path, state: Mapping[str, Tensor], lora: Mapping[str, float], part: str) -> int:
    """Write adapters for diffusers' ``load_lora_weights`` and return the number of layers they adapt.

    The file's B includes the scaling, because a loader without metadata assumes a scaling of 1.

    Args:
        folder: Folder to write to.
        state: Tensors of the network with its adapters.
        lora: Result of :func:`add_lora`.
        part: Name of the network in the pipeline.
    """
    tensors = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            scale = lora["scaling"] if ".lora_B." in name else 1.0
            plain = name.replace(f".{ADAPTER}.weight", ".weight")
            tensors[f"{part}.{plain}"] = (tensor.float() * scale).to(tensor.dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return len(tensors) // 2
