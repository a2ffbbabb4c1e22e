"""What the Würstchen stages share: networks from settings, parts that are not trained, randomness by sample."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from .. import UsageError
from . import optimizers, weights
from .networks import Network

Batch: TypeAlias = dict[str, Any]
Settings: TypeAlias = str | dict[str, Any]
"""A preset's name, or a network's arguments; with "preset" among them, that preset with the others changed."""

STAGES = optimizers.OptimizerSettings(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
"""Of the optimizers of all stages (arXiv 2306.00637)."""

AnyNetwork = TypeVar("AnyNetwork", bound=Network)
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def build(network: type[AnyNetwork], settings: Settings) -> AnyNetwork:
    """Build a fresh network from what a config says.

    Raises:
        UsageError: No preset or argument has that name.
    """
    if isinstance(settings, str):
        return network.from_preset(settings)
    arguments = dict(settings)
    preset = arguments.pop("preset", None)
    return network.from_config(arguments) if preset is None else network.from_preset(preset, **arguments)


def initialise(network: Network, path: str) -> None:
    """Take a network's weights from any layout that ``Network.from_checkpoint`` reads.

    Raises:
        UsageError: The file holds another network, or one of another size.
    """
    state = type(network).from_checkpoint(path).state_dict()
    weights.check(state, network.state_dict(), type(network).__name__, path)
    network.load_state_dict(state)


def holds(path: str, network: type[Network]) -> bool:
    """Say whether a checkpoint file, beside what else it holds, has a network of a class."""
    if not weights.is_one_file(path):
        return False
    content = weights.read_file(path)
    classes = [entry["class"] for entry in content.get("networks", {}).values()]
    return network.__name__ in classes or weights.AUTHORS_FILES.get(network.__name__, "networks") in content


class Frozen(Generic[AnyModule]):
    """A network that a module uses and does not train.

    It is no submodule: neither the optimizer nor the checkpoint nor an average of weights holds it. The checkpoint says
    where it came from and its fingerprint instead.

    Args:
        module: The network.
        source: Name of the file, folder or model on the hub.
    """

    def __init__(self, module: AnyModule, source: str) -> None:
        self.module, self.source = module.eval().requires_grad_(False), source

    def on(self, device: torch.device) -> AnyModule:
        """Return the network, moved to a device the first time."""
        first = next(self.module.parameters(), None)
        if first is not None and first.device != device:
            self.module.to(device)
        return self.module

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its arguments and weights."""
        config = self.module.config if isinstance(self.module, Network) else {}
        digest = hashlib.sha256(repr(sorted(config.items())).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def state(self) -> dict[str, str]:
        """Return what a checkpoint keeps of it."""
        return {"source": self.source, "sha256": self.fingerprint}

    def check(self, kept: Mapping[str, str] | None, name: str) -> None:
        """Refuse to go on with another network than the checkpoint was trained with.

        Raises:
            UsageError: Names both.
        """
        if kept is not None and kept["sha256"] != self.fingerprint:
            raise UsageError(
                f"{name} {self.source} is not the one that the checkpoint was trained with, which came from "
                f"{kept['source']}: give that one"
            )


def pixels(batch: Batch) -> Float[Tensor, "batch 3 h w"]:
    """Return a batch's images in [0, 1]: data modules send bytes."""
    images: Tensor = batch["image"]
    return images.float() / 255 if images.dtype == torch.uint8 else images


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32: what losses are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def generators(batch: Batch) -> list[Generator] | None:
    """Return a generator for each sample of a batch, seeded with its ``seed``; none where it has none.

    They are the CPU's: what is drawn depends neither on the device nor on ranks, workers or micro-batches.
    """
    if "seed" not in batch:
        return None
    return [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]


def uniforms(
    randomness: Sequence[Generator] | None, batch_size: int, count: int, device: torch.device
) -> Float[Tensor, "count batch"]:
    """Draw ``count`` numbers in [0, 1) for each sample, from its own generator."""
    if randomness is None:
        return torch.rand(count, batch_size, device=device)
    return torch.stack([torch.rand(count, generator=one) for one in randomness], dim=1).to(device)
