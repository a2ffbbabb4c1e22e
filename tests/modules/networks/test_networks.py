"""Properties of the networks besides equality with diffusers: initialization, caches, sizes, precision, folders."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from rewurst import UsageError
from rewurst.modules.networks import VQGAN, Network, PatchDiscriminator, Prior, SemanticCompressor, StageBUNet
from rewurst.modules.networks.conditioned import ConditionedResBlock
from rewurst.modules.networks.layers import GlobalResponseNorm, ResBlock, TimestepBlock, timestep_embedding

ALL = [VQGAN, StageBUNet, Prior, SemanticCompressor, PatchDiscriminator]


def stage_b_inputs(h: int = 8, w: int = 8, batch: int = 2) -> tuple[Tensor, ...]:
    return torch.randn(batch, 4, h, w), torch.rand(batch), torch.randn(batch, 16, 3, 5), torch.randn(batch, 7, 32)


def prior_inputs(h: int = 4, w: int = 6, batch: int = 2) -> tuple[Tensor, ...]:
    return torch.randn(batch, 16, h, w), torch.rand(batch), torch.randn(batch, 7, 32)


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        Prior.from_preset("tiny")(torch.randn(2, 16, 4, 4), torch.rand(3), torch.randn(2, 7, 32))


class TestInitialisation:
    def test_residual_outputs_are_scaled_once(self) -> None:
        unet, prior = StageBUNet.from_preset("tiny", blocks=[2, 3]), Prior.from_preset("tiny", depth=4)
        for network, count, kind in ((unet, 5, ConditionedResBlock), (prior, 4, ResBlock)):
            blocks = [module for module in network.modules() if isinstance(module, kind)]
            for block in blocks:
                last = block.channelwise[-1]
                xavier = math.sqrt(2 / sum(last.weight.shape))
                assert last.weight.std().item() == pytest.approx(xavier / math.sqrt(count), rel=0.1)
                assert not last.bias.any()
            assert len(blocks) == (2 * 5 if network is unet else 4)

    @pytest.mark.parametrize("network", [StageBUNet.from_preset("tiny"), Prior.from_preset("tiny")])
    def test_special_layers(self, network: Any) -> None:
        for module in network.modules():
            if isinstance(module, TimestepBlock):
                assert not module.mapper.weight.any()
            if isinstance(module, GlobalResponseNorm):
                assert not module.gamma.any()
                assert not module.beta.any()
        inputs, output, small = (
            ([network.embedding[1]], network.clf[1], [network.clip_mapper, network.effnet_mappers[1]])
            if isinstance(network, StageBUNet)
            else ([], network.out[1], [network.projection])
        )
        assert not output.weight.any()
        for layer in small:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        for layer in inputs:
            assert layer.weight.abs().max().item() <= 0.02 * math.sqrt(6 / sum(layer.weight.shape[:2]))
        assert network.blocks[2].attention.to_q.weight.std() > 0 if isinstance(network, Prior) else True

    @pytest.mark.parametrize("width", [64, 1024])
    def test_texts_keep_their_scale(self, width: int) -> None:
        """The authors' numbers at their widths; a narrow prior sees its texts, too."""
        prior = Prior(c_in=4, c=width, c_cond=width, depth=1, nhead=2)
        stds = [prior.get_parameter(f"cond_mapper.{layer}.weight").std().item() for layer in (0, 2)]
        assert stds == pytest.approx([0.02 if width == 1024 else math.sqrt(2 / 64)] * 2, rel=0.05)
        assert bool(prior.get_parameter("projection.bias").any()) == (width < 1024)

    def test_fresh_networks_learn(self) -> None:
        for network, inputs in (
            (StageBUNet.from_preset("tiny"), stage_b_inputs()),
            (Prior.from_preset("tiny"), prior_inputs()),
        ):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
            for _ in range(2):  # the output starts at zero: the rest receives gradients from the second step on
                optimizer.zero_grad()
                (network(*inputs) - inputs[0].flip(0)).square().mean().backward()
                optimizer.step()
            reached = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in network.parameters()]
            assert sum(reached) > 0.9 * len(reached)

    def test_vqgan(self) -> None:
        vqgan = VQGAN.from_preset("tiny")
        codes = vqgan.vquantizer.embedding.weight
        assert codes.abs().max() <= 1 / 64
        assert codes.abs().max() > 0.9 / 64
        assert not any(module.gammas.any() for module in vqgan.modules() if hasattr(module, "gammas"))


class TestCache:
    @pytest.mark.parametrize(("network", "inputs"), [(StageBUNet, stage_b_inputs), (Prior, prior_inputs)])
    @torch.no_grad()
    def test_changes_nothing(self, network: type[Network], inputs: Any, randomize: Any) -> None:
        model = randomize(network.from_preset("tiny"), 0.05)
        x, _, *conditions = inputs()
        cache: dict[str, tuple[Tensor, ...]] = {}
        for time in (1.0, 0.5, 0.1):
            t = torch.full((2,), time)
            torch.testing.assert_close(model(x, t, *conditions, cache), model(x, t, *conditions), rtol=1e-6, atol=1e-6)

    @torch.no_grad()
    def test_spares_the_text(self, randomize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        prior = randomize(Prior.from_preset("tiny"))
        x, t, text = prior_inputs()
        cache: dict[str, tuple[Tensor, ...]] = {}
        prior(x, t, text, cache)
        calls = []
        for module in [prior.cond_mapper, *(block.kv_mapper for block in prior.blocks if hasattr(block, "kv_mapper"))]:
            module.register_forward_hook(lambda *_: calls.append(1))
        prior(x, t, text, cache)
        assert not calls

    @torch.no_grad()
    def test_guidance_shares_what_comes_before_the_text(self, randomize: Any) -> None:
        prior = randomize(Prior.from_preset("tiny"), 0.05)
        x, t, _ = prior_inputs()
        text = torch.randn(6, 7, 32)
        expected = prior(x.repeat(3, 1, 1, 1), t.repeat(3), text)
        torch.testing.assert_close(prior(x, t, text), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9))
def test_prior_takes_any_size_and_batches_equal_singles(h: int, w: int) -> None:
    torch.manual_seed(h * 10 + w)
    prior = Prior.from_preset("tiny").eval()
    nn.init.normal_(prior.out[1].weight, std=0.02)
    inputs = prior_inputs(h, w)
    with torch.no_grad():
        batch = prior(*inputs)
        singles = torch.cat([prior(*(part[i : i + 1] for part in inputs)) for i in range(2)])
    assert batch.shape == inputs[0].shape
    torch.testing.assert_close(batch, singles, rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5))
def test_stage_b_takes_any_multiple_and_batches_equal_singles(h: int, w: int) -> None:
    torch.manual_seed(h * 10 + w)
    unet = StageBUNet.from_preset("tiny").eval()
    nn.init.normal_(unet.clf[1].weight, std=0.02)
    inputs = stage_b_inputs(h * unet.multiple, w * unet.multiple)
    with torch.no_grad():
        batch = unet(*inputs)
        singles = torch.cat([unet(*(part[i : i + 1] for part in inputs)) for i in range(2)])
    assert batch.shape == inputs[0].shape
    torch.testing.assert_close(batch, singles, rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5))
def test_vqgan_takes_any_multiple_and_batches_equal_singles(h: int, w: int) -> None:
    torch.manual_seed(h * 10 + w)
    vqgan = VQGAN.from_preset("tiny").eval()
    for name, parameter in vqgan.named_parameters():
        if name.endswith("gammas"):
            nn.init.normal_(parameter, std=0.5)
    images = torch.rand(2, 3, h * 4, w * 4)
    with torch.no_grad():
        batch, quantized = vqgan(images)
        singles = torch.cat([vqgan(images[i : i + 1])[0] for i in range(2)])
        assert vqgan.to_images(vqgan.to_latents(images)).shape == images.shape
    assert quantized.latents.shape == (2, 4, h, w)
    assert batch.shape == images.shape
    torch.testing.assert_close(batch, singles, rtol=1e-4, atol=1e-5)


def test_prior_scale() -> None:
    z = torch.randn(1, 16, 2, 2)
    prior = Prior.from_preset("tiny")
    torch.testing.assert_close(prior.denormalize(prior.normalize(z)), z)
    assert prior.normalize(torch.full((1, 1, 1, 1), 41.0)).item() == 1


def test_quantizer_gradient_goes_straight_through() -> None:
    vqgan = VQGAN.from_preset("tiny")
    latents = torch.randn(1, 4, 3, 5, requires_grad=True)
    quantized = vqgan.quantize(latents)
    quantized.latents.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))
    codes = vqgan.vquantizer.embedding.weight
    nearest = (latents.detach().permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1).argmin(-1)
    assert torch.equal(quantized.indices, nearest)
    z, c = latents.detach().permute(0, 2, 3, 1), codes[nearest]
    torch.testing.assert_close(quantized.loss.detach(), 1.25 * (z - c).square().mean().detach())


class TestPrecision:
    def test_grn_does_not_overflow_in_float16(self) -> None:
        norm = GlobalResponseNorm(8)
        nn.init.normal_(norm.gamma)
        x = torch.rand(1, 32, 32, 8) * 8000 + 100
        with torch.no_grad():
            expected = norm(x)
            half = norm.half()(x.half())
        assert half.isfinite().all()
        torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=1e-1)

    def test_grn_gradient_is_finite_at_zero(self) -> None:
        x = torch.zeros(1, 2, 2, 3, requires_grad=True)
        GlobalResponseNorm(3)(x).sum().backward()
        assert x.grad.isfinite().all()

    def test_grn_gradients_are_those_of_finite_differences(self) -> None:
        norm = GlobalResponseNorm(5).double()
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(norm, (x,))

    def test_neighboring_timesteps_differ_in_bfloat16(self) -> None:
        embedded = timestep_embedding(torch.tensor([0.9000, 0.9002]), 64, torch.bfloat16)
        assert (embedded[0] - embedded[1]).abs().max() > 0.5

    @torch.no_grad()
    def test_bfloat16_networks_keep_the_samples_dtype(self) -> None:
        for network, inputs in (
            (StageBUNet.from_preset("tiny"), stage_b_inputs()),
            (Prior.from_preset("tiny"), prior_inputs()),
        ):
            out = network.bfloat16().eval()(*inputs)
            assert out.dtype == torch.float32
            assert out.isfinite().all()

    def test_autocast_trains(self) -> None:
        for network, inputs in (
            (StageBUNet.from_preset("tiny"), stage_b_inputs()),
            (Prior.from_preset("tiny"), prior_inputs()),
        ):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = network(*inputs).square().mean()
            loss.backward()
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                assert network(*inputs).isfinite().all()


class TestEncoders:
    def test_released_compressor(self) -> None:
        with torch.device("meta"):
            compressor = SemanticCompressor.from_preset("released")
        assert sum(parameter.numel() for parameter in compressor.backbone.parameters()) == 20_177_488
        assert compressor.pixels_per_latent == 42.67
        assert compressor.mapper[0].weight.shape == (16, 1280, 1, 1)

    def test_sizes(self) -> None:
        compressor = SemanticCompressor.from_preset("tiny").eval()
        assert compressor(torch.rand(2, 3, 64, 96)).shape == (2, 16, 4, 6)
        assert compressor.pixels_per_latent == 16

    @pytest.mark.parametrize(("depth", "seen"), [(0, 15), (1, 31), (2, 47)])
    def test_receptive_field_of_the_small_backbone(self, depth: int, seen: int) -> None:
        """Three convolutions of stride 2 see 1 + 2 + 4 + 8 pixels, each block of stride 1 two strides more.

        Fresh blocks add nothing.
        """
        compressor = SemanticCompressor(4, "small", [8, 8, 8], input_scale=1.0, depth=depth).eval()
        images = torch.rand(1, 3, 128, 128, requires_grad=True)
        shallow = compressor.backbone[:3](images)
        torch.testing.assert_close(compressor.backbone(images), shallow)
        for block in compressor.backbone[3:]:
            nn.init.ones_(block.get_parameter("block.0.1.weight"))
        compressor(images)[0, :, 8, 8].sum().backward()
        assert images.grad is not None
        touched = images.grad.abs().sum((0, 1)).nonzero()
        assert (touched.amax(0) - touched.amin(0) + 1).tolist() == [seen, seen]

    def test_released_compressor_turns_512_pixels_into_12(self) -> None:
        compressor = SemanticCompressor(c_latent=16).eval()
        with torch.no_grad():
            assert compressor(torch.rand(1, 3, 128, 256)).shape == (1, 16, 3, 6)

    def test_discriminator(self) -> None:
        judge = PatchDiscriminator.from_preset("tiny")
        assert judge(torch.rand(2, 3, 32, 48)).shape == (2, 1, 4, 6)
        convs = [module for module in judge.encoder.modules() if isinstance(module, nn.Conv2d)]
        assert all(hasattr(conv, "parametrizations") for conv in convs)
        with torch.device("meta"):
            full = PatchDiscriminator.from_preset("released")
        widths = [module.out_channels for module in full.encoder.modules() if isinstance(module, nn.Conv2d)]
        assert widths == [64, 128, 256, 512, 512, 512]


@pytest.mark.parametrize("network", ALL)
class TestFolders:
    def test_round_trip(self, network: type[Network], tmp_path: Path, randomize: Any) -> None:
        one = randomize(network.from_preset("tiny"))
        one.save(tmp_path)
        other = network.from_folder(tmp_path)
        assert other.config == one.config
        assert not other.training
        states = one.state_dict(), other.state_dict()
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        halves = network.from_folder(tmp_path, dtype=torch.bfloat16).parameters()
        assert all(parameter.dtype == torch.bfloat16 for parameter in halves)

    def test_blocks_exist(self, network: type[Network]) -> None:
        kinds = {type(module).__name__ for module in network.from_preset("tiny").modules()}
        blocks = network._no_split_modules
        assert not blocks or kinds & set(blocks)

    def test_presets(self, network: type[Network]) -> None:
        assert {"tiny", "small", "paper", "released"} <= set(network.presets)
        with torch.device("meta"):
            for preset in network.presets:
                network.from_preset(preset)


COMPILED = """
import torch
from rewurst.modules.networks import Prior, StageBUNet, compile_blocks
torch.set_num_threads(1)
x, t, effnet, text = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 16, 3, 5), torch.randn(2, 7, 32)
for network, inputs in ((Prior, (torch.randn(2, 16, 4, 6), t, text)), (StageBUNet, (x, t, effnet, text))):
    model, graphs = network.from_preset("tiny").eval(), []
    for tensor in model.state_dict().values():
        tensor.uniform_(-0.05, 0.07)
    expected = model(*inputs).detach()
    compile_blocks(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert graphs
"""


def test_compiled_blocks_change_nothing() -> None:
    """Run in a separate process, because Dynamo cannot trace the checks of shapes."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Prior.from_preset("huge"), "Prior has no preset 'huge': choose one of tiny, small, paper, released"),
        (lambda: Prior.from_preset("tiny", heads=3), "Prior has no argument 'heads': it has c_in, c, "),
        (
            lambda: SemanticCompressor(backbone="vgg"),
            "backbone 'vgg' is unknown: choose 'efficientnet_v2_s' or 'small'",
        ),
        (lambda: Prior.from_preset("tiny", nhead=3), "c is 64 and nhead is 3: nhead must divide c"),
        (
            lambda: StageBUNet.from_preset("tiny", blocks=[1]),
            "blocks has 1 entries but c_hidden has 2: give one per level",
        ),
        (lambda: StageBUNet.from_preset("tiny", level_config=["CT", "CX"]), "level_config has 'X': use C, T and A"),
        (lambda: StageBUNet.from_preset("tiny", level_config=["CT", "TA"]), "level_config has 'TA': begin each level"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit() -> None:
    unet = StageBUNet.from_preset("tiny")
    with pytest.raises(UsageError, match="latents are 6x8: height and width must be multiples of 4"):
        unet(*stage_b_inputs(6, 8))
    with pytest.raises(
        UsageError, match="images of 8x8 have one patch of 8 pixels: give larger ones or a smaller depth"
    ):
        PatchDiscriminator.from_preset("tiny")(torch.rand(2, 3, 8, 8))
    with pytest.raises(UsageError, match="got 3 texts for 2 latents"):
        Prior.from_preset("tiny")(torch.randn(2, 16, 4, 4), torch.rand(2), torch.randn(3, 7, 32))
    with pytest.raises(UsageError, match="images are 34x32: height and width must be multiples of 4"):
        VQGAN.from_preset("tiny").encode(torch.rand(1, 3, 34, 32))
