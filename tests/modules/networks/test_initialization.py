"""Initial weights and sizes of the networks against the authors' code and the paper's counts."""

from __future__ import annotations

import pytest
import torch

from rewurst.modules.networks import Prior, StageBUNet
from rewurst.modules.networks.layers import AttnBlock


def test_queries_keys_and_values_have_the_deviation_of_the_authors_fused_matrix() -> None:
    """torch's MultiheadAttention initializes (3 c, c) at once: 0.0198 at width 1280, not 0.0279."""
    torch.manual_seed(0)
    prior = Prior(c_in=4, c=1280, c_cond=8, depth=1, nhead=20)
    [block] = [module for module in prior.modules() if isinstance(module, AttnBlock)]
    authors = torch.nn.MultiheadAttention(1280, 20).in_proj_weight.std().item()
    for layer in (block.attention.to_q, block.attention.to_k, block.attention.to_v):
        assert layer.weight.std().item() == pytest.approx(authors, rel=0.01)
        assert layer.weight.std().item() == pytest.approx(0.0198, abs=2e-4)
        assert not layer.bias.any()


@pytest.mark.parametrize(
    ("network", "preset", "parameters"),
    [(Prior, "paper", 993_243_680), (Prior, "released", 993_636_896), (StageBUNet, "paper", 1_055_365_280)],
)
def test_presets_have_the_papers_parameters(network: type[Prior], preset: str, parameters: int) -> None:
    with torch.device("meta"):
        built = network.from_preset(preset)
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters
