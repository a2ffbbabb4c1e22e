"""Frozen networks that a stage uses and does not train."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import nn

from ... import UsageError
from ..networks import Network

AnyModule = TypeVar("AnyModule", bound=nn.Module)


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
