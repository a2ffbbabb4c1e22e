"""Floating-point operations of a training step, counted from the networks' matrix products.

A multiplication and an addition count as two. A backward pass takes twice as many as the forward pass, for the inputs
and for the weights. Recomputation to save memory is not counted, as in every published model FLOP utilization.
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from ..losses.perceptual import LPIPS
from ..networks import VQGAN, PatchDiscriminator, TextEncoder
from ..networks.base import Network

Shape = tuple[int, ...]
TRAINED = 3  # forward, and backward to inputs and weights
FROZEN = 1
PASSED = 2  # forward, and backward to the inputs only


def flops_per_token(parameters: int, layers: int, width: int, length: int) -> float:
    """Return the FLOPs per token of training a transformer: 6 N + 12 L d T (Chowdhery et al. 2022, appendix B).

    Args:
        parameters: Number of parameters that a token is multiplied with, N.
        layers: Number of layers, L.
        width: Width of the hidden states, d.
        length: Length of a row in tokens, T; attention counts as if every token attended to all others.
    """
    return 6.0 * parameters + 12.0 * layers * width * length


def matrix_parameters(model: nn.Module) -> int:
    """Return the number of a transformers model's parameters that tokens are multiplied with in training.

    Frozen parameters, such as those under adapters, count two thirds, because they have no gradients.

    Vectors (norms, biases) and embeddings that are only looked up (tokens, positions) are left out. An embedding that
    is tied to the head counts once, as the head.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    looked_up -= {id(head.weight)} if head is not None else set()
    counted = [each for each in model.parameters() if each.dim() > 1 and id(each) not in looked_up]
    frozen = sum(each.numel() for each in counted if not each.requires_grad)
    return sum(each.numel() for each in counted) - frozen // 3


def forward_flops(network: Network, shapes: Sequence[Shape | None], method: str = "__call__") -> float:
    """Return the FLOPs of a forward pass of ``network.method`` on inputs of given shapes (None for no input).

    They are counted once per network and shapes, on a copy on the meta device.
    """
    config = json.dumps(network.config, sort_keys=True)
    return _counted(type(network), config, tuple(shape and tuple(shape) for shape in shapes), method)  # type: ignore[arg-type]


def text_flops(encoder: TextEncoder, texts: int) -> float:
    """Return the FLOPs of a text encoder's forward pass on a number of texts."""
    config = encoder.model.config.to_json_string(use_diff=False)
    return _counted_text(type(encoder.model), config, texts, encoder.length)  # type: ignore[arg-type]


@cache
def lpips_flops(images: Shape) -> float:
    """Return the FLOPs of LPIPS's network on one of the two batches of images (n, 3, height, width) it compares."""
    with torch.random.fork_rng([]), torch.device("meta"):
        return _count(LPIPS(vgg16()), "features", [torch.empty(images)])


def stage_a_flops(
    vqgan: VQGAN, images: Shape, adversary: PatchDiscriminator | None = None, perceptual: bool = False
) -> float:
    """Return the FLOPs of a training step of Stage A on images (n, 3, height, width).

    The discriminator processes the reconstructions twice, once per network's loss, and the originals once. LPIPS
    processes both, with gradients only for the reconstructions.
    """
    latents = (images[0], vqgan.config["latent_channels"], *(side // vqgan.compression for side in images[2:]))
    total = TRAINED * (forward_flops(vqgan, [images], "encode") + forward_flops(vqgan, [latents], "decode"))
    if adversary is not None:
        total += (PASSED + 2 * TRAINED) * forward_flops(adversary, [images])
    if perceptual:
        total += (PASSED + FROZEN) * lpips_flops(images)
    return total


@cache
def _counted(network: type[Network], config: str, shapes: tuple[Shape | None, ...], method: str) -> float:
    with torch.random.fork_rng([]), torch.device("meta"):
        inputs = [None if shape is None else torch.empty(shape) for shape in shapes]
        return _count(network.from_config(json.loads(config)), method, inputs)


@cache
def _counted_text(model: Any, config: str, texts: int, length: int) -> float:
    with torch.random.fork_rng([]), torch.device("meta"):
        fresh = model(model.config_class(**json.loads(config)))
        return _count(fresh, "__call__", [torch.zeros(texts, length, dtype=torch.long)])


def _count(network: nn.Module, method: str, inputs: Sequence[torch.Tensor | None]) -> float:
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        getattr(network, method)(*inputs)  # with gradients, because networks compute some things differently without
    return float(counter.get_total_flops())
