"""Networks are tiny, with every parameter away from its special initial value."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

Randomize = Callable[..., nn.Module]


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def randomize() -> Randomize:
    """Move every parameter and buffer away from what it starts as."""

    def move(network: nn.Module, scale: float = 0.2) -> nn.Module:
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(-scale, scale).add_(0.02)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
        return network.eval()

    return move
