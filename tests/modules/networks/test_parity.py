"""The three networks equal diffusers' classes."""

from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from torch import Tensor

from rewurst.modules.networks import VQGAN, Network, Prior, StageBUNet

PAIRS = [(VQGAN, PaellaVQModel), (StageBUNet, WuerstchenDiffNeXt), (Prior, WuerstchenPrior)]

MIDDLE: dict[type[Network], dict[str, Any]] = {
    VQGAN: {"bottleneck_blocks": 3, "embed_dim": 96, "levels": 3},
    StageBUNet: {
        "c_cond": 64,
        "c_hidden": [32, 64, 128],
        "nhead": [-1, 2, 4],
        "blocks": [2, 1, 2],
        "level_config": ["CT", "CTA", "CTA"],
        "inject_effnet": [False, True, True],
        "clip_embd": 48,
        "c_r": 33,
    },
    Prior: {"c": 192, "depth": 3, "nhead": 3, "c_cond": 48},
}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def pair(ours: type[Network], theirs: type, config: dict[str, Any], dtype: torch.dtype, randomize: Any) -> Any:
    one = randomize(ours.from_config(config)).to(dtype)
    if isinstance(one, Prior):  # |1 - b| must not come near 0, where rounding is amplified
        one.out[1].weight.data.mul_(0.02)
    other = theirs(**one.config).to(dtype).eval()
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize(
    ("ours", "theirs", "parameters", "tensors"),
    [
        (VQGAN, PaellaVQModel, 18_406_894, 122),
        (StageBUNet, WuerstchenDiffNeXt, 1_055_365_280, 990),
        (Prior, WuerstchenPrior, 993_636_896, 648),
    ],
)
def test_full_size_names_and_shapes(ours: type[Network], theirs: type, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        one = ours.from_preset("released")
        other = theirs(**one.config)
    assert sum(parameter.numel() for parameter in one.parameters()) == parameters
    assert len(one.state_dict()) == tensors
    shapes = {name: tensor.shape for name, tensor in one.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in other.state_dict().items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", ["tiny", "middle"])
class TestForward:
    def config(self, network: type[Network], size: str) -> dict[str, Any]:
        return dict(network.presets["tiny"]) if size == "tiny" else MIDDLE[network]

    @torch.no_grad()
    def test_vqgan(self, size: str, dtype: torch.dtype, tolerance: float, randomize: Any) -> None:
        ours, theirs = pair(*PAIRS[0], self.config(VQGAN, size), dtype, randomize)
        images = torch.rand(2, 3, 48, 32, dtype=dtype)
        latents = theirs.encode(images).latents
        assert relative(ours.encode(images), latents) < tolerance
        assert relative(ours(images, quantize=False)[0], theirs(images).sample) < tolerance
        quantized = ours.quantize(latents)
        expected, loss, (_, _, indices) = theirs.vquantizer(latents)
        assert torch.equal(quantized.indices.flatten(), indices.flatten())
        assert relative(quantized.latents, expected) < tolerance
        assert relative(quantized.loss, loss) < tolerance
        assert relative(ours(images)[0], theirs.decode(latents, force_not_quantize=False).sample) < tolerance

    @torch.no_grad()
    def test_stage_b(self, size: str, dtype: torch.dtype, tolerance: float, randomize: Any) -> None:
        ours, theirs = pair(*PAIRS[1], self.config(StageBUNet, size), dtype, randomize)
        x, t = torch.randn(2, 4, 16, 24, dtype=dtype), torch.rand(2, dtype=dtype)
        effnet, text = torch.randn(2, 16, 3, 5, dtype=dtype), torch.randn(2, 7, ours.config["clip_embd"], dtype=dtype)
        expected = theirs(x, t, effnet, text)
        cache: dict[str, tuple[Tensor, ...]] = {}
        assert relative(ours(x, t, effnet, text), expected) < tolerance
        assert relative(ours(x, t, effnet, text, cache), expected) < tolerance
        assert relative(ours(x, t, effnet, text, cache), expected) < tolerance

    @torch.no_grad()
    def test_prior(self, size: str, dtype: torch.dtype, tolerance: float, randomize: Any) -> None:
        ours, theirs = pair(*PAIRS[2], self.config(Prior, size), dtype, randomize)
        x, t = torch.randn(2, 16, 3, 5, dtype=dtype), torch.rand(2, dtype=dtype)
        text = torch.randn(4, 7, ours.config["c_cond"], dtype=dtype)
        twice = (x.repeat(2, 1, 1, 1), t.repeat(2))
        expected = theirs(*twice, text)
        cache: dict[str, tuple[Tensor, ...]] = {}
        assert relative(ours(*twice, text), expected) < tolerance
        assert relative(ours(x, t, text), expected) < tolerance
        assert relative(ours(x, t, text, cache), expected) < tolerance
        assert relative(ours(x, t, text, cache), expected) < tolerance


@pytest.mark.parametrize(("ours", "theirs"), PAIRS[1:])
def test_gradients(ours: type[Network], theirs: type, randomize: Any) -> None:
    one, other = pair(ours, theirs, dict(ours.presets["tiny"]), torch.float64, randomize)
    condition = [torch.randn(2, 16, 3, 5).double().requires_grad_()] if ours is StageBUNet else []
    into_compressor: list[Tensor] = []
    inputs = [torch.randn(2, one.config["c_in"], 8, 8).double(), torch.rand(2).double(), *condition]
    inputs.append(torch.randn(2, 7, 32).double())
    for network in (one, other):
        network(*inputs).square().sum().backward()
        if condition:  # the Semantic Compressor learns with Stage B
            into_compressor.append(condition[0].grad.clone())
            condition[0].grad = None
    if condition:
        torch.testing.assert_close(*into_compressor, rtol=1e-5, atol=1e-6)
    theirs_by_name = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        expected = theirs_by_name[name].grad
        if expected is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-9, msg=name)
