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
    """A network that a module uses but does not train.

    It is not a submodule, so optimizer, checkpoint and weight averages do not contain it. The checkpoint stores its
    source and fingerprint instead.

    Args:
        module: Network to freeze.
        source: Name of its file, folder or model on the hub.
    """

    def __init__(self, module: AnyModule, source: str) -> None:
        self.module, self.source = module.eval().requires_grad_(False), source

    def on(self, device: torch.device) -> AnyModule:
        """Return the network on a device, moving it the first time."""
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
        """Return its description in checkpoints."""
        return {"source": self.source, "sha256": self.fingerprint}

    def check(self, kept: Mapping[str, str] | None, name: str) -> None:
        """Check that this is the network that the checkpoint was trained with.

        Raises:
            UsageError: It is a different network; the message names both.
        """
        if kept is not None and kept["sha256"] != self.fingerprint:
            raise UsageError(
                f"{name} {self.source} is not the one that the checkpoint was trained with, which came from "
                f"{kept['source']}: give that one"
            )
