"""Steps of optimizers, and of a small language model with something to learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewurst.modules import CausalLM


def steps(optimizer: torch.optim.Optimizer, count: int, seed: int = 0) -> None:
    """Step with gradients that depend only on the seed and the parameters' order."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()


def text(rows: int, length: int, vocabulary: int) -> Tensor:
    """Return tokens that follow from the previous one with some noise, so that they can be learned."""
    draw = torch.Generator().manual_seed(0)
    follows = torch.randint(vocabulary, (vocabulary, 2), generator=draw)
    tokens = [torch.randint(vocabulary, (rows,), generator=draw)]
    for _ in range(length - 1):
        chosen = torch.randint(2, (rows,), generator=draw)
        tokens.append(follows[tokens[-1], chosen])
    return torch.stack(tokens, 1)


def train(config: dict[str, Any], name: Any, count: int) -> tuple[list[float], torch.optim.Optimizer]:
    """Return the losses of a language model's steps and its optimizer, at a learning rate for its kind."""
    torch.manual_seed(0)
    module = CausalLM(config | {"hidden_size": 64, "intermediate_size": 128}, optimizer=name)
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = 3e-4 if "lion" in name else 3e-3
    losses, rows = [], text(8 * count, 16, 64)
    for step in range(count):
        loss = module.loss(rows[8 * step : 8 * step + 8])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer
