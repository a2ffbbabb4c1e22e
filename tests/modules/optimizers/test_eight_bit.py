"""8-bit optimizers compared with bitsandbytes' and with 32-bit ones, and their checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional, optim
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from optimizer_steps import steps, train
from torch import Tensor, nn

from rewurst import UsageError
from rewurst.modules import AdamW8bit, Lion, Lion8bit, StageA
from rewurst.modules.optimizers.block_quantisation import count_blocks, decode, encode, table
from rewurst.modules.optimizers.choice import OptimizerSettings

CPU = torch.device("cpu")
NAMES = ("adamw", "adamw_8bit", "lion", "lion_8bit", "muon")
SETTINGS = OptimizerSettings(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 1500), st.booleans(), st.floats(-30, 4))
def test_decoded_states_are_encoded_bit_for_bit(seed: int, elements: int, signed: bool, exponent: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(elements, generator=draw) ** 3 * 10**exponent
    values = values if signed else values.abs()
    numbers = table(signed, CPU)
    codes, kept = functional.quantize_blockwise(values, code=numbers, blocksize=256)
    decoded = decode(codes, kept.absmax, numbers)
    again = decode(*encode(decoded, numbers), numbers)
    assert torch.equal(again, decoded)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed: bool) -> None:
    values = torch.randn(1000).mul(torch.logspace(-6, 0, 1000))
    values = values if signed else values.abs()
    numbers = table(signed, CPU)
    codes, scales = encode(values, numbers)
    assert (codes.dtype, len(scales)) == (torch.uint8, count_blocks(1000))
    expected = torch.stack([block.abs().max() for block in values.split(256)])
    torch.testing.assert_close(scales, expected)
    of_element = scales.repeat_interleave(256)[:1000]
    nearest = (values[:, None] - numbers * of_element[:, None]).abs().amin(1)
    torch.testing.assert_close((decode(codes, scales, numbers) - values).abs(), nearest, rtol=1e-4, atol=1e-9)


def test_blocks_of_zeros_stay_zeros() -> None:
    assert not decode(*encode(torch.zeros(300), table(True, CPU)), table(True, CPU)).any()


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in [(80, 70), (300,)]]


PAIRS: list[tuple[Any, Any]] = [(AdamW8bit, optim.AdamW8bit), (Lion8bit, optim.Lion8bit), (Lion, optim.Lion)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_steps_are_those_of_bitsandbytes(ours: Any, theirs: Any) -> None:
    mine, other = parameters(), parameters()
    for kind, of_kind in ((ours, mine), (theirs, other)):
        steps(kind(of_kind, lr=1e-2, weight_decay=0.1), 10)
    assert torch.equal(mine[0], other[0]) or ours is Lion
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_weights_in_another_memory_layout_step_the_same() -> None:
    values = torch.randn(16, 32, 3, 3)
    plain, last = nn.Parameter(values.clone()), nn.Parameter(values.clone().to(memory_format=torch.channels_last))
    for parameter in (plain, last):
        steps(AdamW8bit([parameter]), 3)
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_200_steps_end_within_a_hundredth_of_32_bits(tiny_config: dict[str, Any], name: str) -> None:
    whole, _ = train(tiny_config, name, 200)
    in_8_bits, _ = train(tiny_config, f"{name}_8bit", 200)
    end = sum(whole[-20:]) / 20
    assert end < 0.6 * whole[0], "it learns"
    assert sum(in_8_bits[-20:]) / 20 == pytest.approx(end, rel=0.01)


def state_bytes(optimizer: torch.optim.Optimizer, only_8_bits: bool) -> dict[Tensor, int]:
    found = {}
    for parameter, state in optimizer.state.items():
        tensors = [value for key, value in state.items() if key != "step"]
        if not only_8_bits or tensors[0].dtype == torch.uint8:
            found[parameter] = sum(tensor.nbytes for tensor in tensors)
    return found


def test_states_take_little_more_than_a_byte_each(tiny_config: dict[str, Any]) -> None:
    for name, moments in (("adamw_8bit", 2), ("lion_8bit", 1)):
        _, optimizer = train(tiny_config, name, 1)
        small = state_bytes(optimizer, only_8_bits=True)
        elements = sum(parameter.numel() for parameter in small)
        assert len(small) == 2 * 4 + 1
        assert sum(small.values()) / (4 * moments * elements) < 0.26
        others = set(optimizer.state) - set(small)
        embeddings = [parameter for parameter in others if parameter.numel() >= 4096]
        assert [parameter.shape for parameter in embeddings] == [(64, 64)]
        assert all(optimizer.state[parameter]["exp_avg"].dtype == torch.float32 for parameter in others)


@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_exact(name: Any) -> None:
    mine = parameters()
    optimizer = SETTINGS.of(name)([{"params": mine}])
    steps(optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    other = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    again = SETTINGS.of(name)([{"params": other}])
    again.load_state_dict(saved)
    for one in (optimizer, again):
        steps(one, 5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize(
    ("first", "second"),
    [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw"), ("lion", "lion_8bit"), ("lion_8bit", "lion")],
)
def test_states_cross_between_8_and_32_bits(first: Any, second: Any) -> None:
    mine, other = parameters(), parameters()
    for target, names in ((mine, (first, first)), (other, (first, second))):
        optimizer = SETTINGS.of(names[0])([{"params": target}])
        steps(optimizer, 20)
        saved = optimizer.state_dict()
        optimizer = SETTINGS.of(names[1])([{"params": target}])
        optimizer.load_state_dict(saved)
        assert all(value.dtype == torch.float32 for value in saved["state"][0].values())
        if names[1] == "adamw":
            assert optimizer.param_groups[0]["fused"]
        before = [parameter.detach().clone() for parameter in target]
        steps(optimizer, 1, seed=3)
        target[:] = [nn.Parameter(new - old) for new, old in zip(target, before, strict=True)]
    # Directions of a step: fresh moments would give another one.
    assert torch.cosine_similarity(mine[0].flatten(), other[0].flatten(), dim=0) > 0.97
    torch.testing.assert_close(mine[1], other[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("lion", "adamw", "stores exp_avg per parameter, but AdamW needs exp_avg and exp_avg_sq: keep the optimizer"),
        ("adamw", "lion_8bit", "stores exp_avg and exp_avg_sq per parameter, but Lion8bit needs exp_avg"),
        ("lion_8bit", "adamw_8bit", "stores exp_avg per parameter, but AdamW8bit needs exp_avg and exp_avg_sq"),
        (
            "adamw",
            "muon",
            "stores exp_avg and exp_avg_sq per parameter, but Muon needs momentum_buffer: keep the optimizer",
        ),
        ("muon", "adamw", "stores momentum_buffer per parameter, but AdamW needs exp_avg and exp_avg_sq"),
    ],
)
def test_states_of_other_optimizers_are_refused(first: Any, second: Any, expected: str) -> None:
    optimizer = SETTINGS.of(first)([{"params": parameters()}])
    steps(optimizer, 1)
    with pytest.raises(UsageError, match=expected):
        SETTINGS.of(second)([{"params": parameters()}]).load_state_dict(optimizer.state_dict())


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match=r"^optimizer 'adamw_8bits' is not one of .*; did you mean 'adamw_8bit'\?$"):
        SETTINGS.of("adamw_8bits")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^AdamW8bit: betas \(0.9, 1.0\) must be"):
        AdamW8bit(parameters(), betas=(0.9, 1.0))
    on_meta = nn.Parameter(torch.zeros(80, 80, device="meta"))
    on_meta.grad = torch.zeros_like(on_meta)
    with pytest.raises(UsageError, match=r"no kernel on meta, only on cpu, cuda, xpu: use optimizer adamw$"):
        AdamW8bit([on_meta]).step()


def test_every_stage_takes_the_name(tmp_path: Path, picture_data: Callable[..., Any]) -> None:
    module = StageA("tiny", "tiny", perceptual_weight=0.0, adversarial_start=0, optimizer="adamw_8bit")
    module.discriminator_optimizer = "lion_8bit"
    run = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    run.fit(module, picture_data(steps=2))
    first, second = run.optimizers
    assert isinstance(first, AdamW8bit)
    assert isinstance(second, Lion8bit)
    codebook = module.vqgan.vquantizer.embedding.weight
    assert first.state[codebook]["exp_avg"].dtype == torch.float32
