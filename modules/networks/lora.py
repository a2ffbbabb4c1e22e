"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in a network, through peft: add, merge, write for diffusers.

A linear layer W becomes W + scaling B A; only A and B are trained. Checkpoints keep all three.
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
SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")  # what a merge can reproduce
ADAPTER = "default"  # what peft calls the only adapter there is
FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks
_BASE = ".base_layer."


def add_lora(network: nn.Module, settings: Mapping[str, Any]) -> dict[str, float]:
    """Freeze a network and add adapters to its linear layers.

    Args:
        network: The network.
        settings: Those of ``peft.LoraConfig``: ``r`` (default: 16), ``lora_alpha`` (default: ``r``), ``lora_dropout``,
            ``target_modules`` (default: the layers of attention), ``use_rslora``.

    Returns:
        What a merge needs to know, to be kept in checkpoints.

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
        raise UsageError(f"lora's r is {rank!r}, expected a whole number from 1")
    targets = settings.get("target_modules", TARGETS)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UsageError(f"lora's target_modules are {targets!r}, expected a list of names of layers")
    for name, layer in network.named_modules():  # peft takes convolutions too, but not those of ours
        if any(f".{name}".endswith(f".{target}") for target in targets) and type(layer) is not nn.Linear:
            raise UsageError(f"lora's target_modules reach {name}, which is not a linear layer: leave it out")
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
    """Give a layer's adapters numbers where its base has them.

    peft moves adapters there, which the fake tensors of `rewurst plan` do not allow. So it makes them outside of their
    mode, on the meta device, from where it moves nothing.
    """
    base = layer.get_base_layer().weight
    for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
        part.weight = nn.Parameter(torch.empty(part.weight.shape, dtype=base.dtype, device=base.device))
    layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


def merged(state: Mapping[str, Tensor], lora: Mapping[str, float]) -> dict[str, Tensor]:
    """Return a network's tensors with the adapters added to the layers that they adapt, by their plain names."""
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
    """Write adapters as the file that diffusers' ``load_lora_weights`` reads; return how many layers they adapt.

    The scaling is part of B there: a loader without metadata takes it for 1.

    Args:
        folder: Folder to write.
        state: Tensors of the network with its adapters.
        lora: What :func:`add_lora` returned.
        part: What the pipeline calls the network.
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
