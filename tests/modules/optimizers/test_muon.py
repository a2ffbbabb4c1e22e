"""Muon compared with singular value decomposition, torch's Muon and AdamW, and its choice of parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_steps import steps, train
from torch import nn

from rewurst import UsageError
from rewurst.modules import CausalLM, Muon, StageA
from rewurst.modules.optimizers import muon

MATRICES: list[Any] = [(24, 40), (40, 24), (16, 16), (40, 24), (8, 4, 3, 3)]
OTHERS: list[Any] = [(30,), (8, 1, 3, 3), (1, 1, 1, 12)]  # a vector, depthwise kernels, response norms' scales


def parameters(shapes: list[Any] = MATRICES + OTHERS) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 6),
    st.floats(-6, 6),
)
def test_singular_values_go_through_the_polynomial_and_vectors_stay(
    seed: int, count: int, rows: int, columns: int, iterations: int, exponent: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    matrices = torch.randn(count, rows, columns, generator=draw) * 10**exponent
    u, values, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    expected = u @ torch.diag_embed(values) @ v
    torch.testing.assert_close(muon.orthogonalise(matrices, iterations).double(), expected, rtol=0, atol=2e-4)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    [matrix] = parameters([(5, 7)])
    before = matrix.detach().clone()
    matrix.grad = torch.zeros_like(matrix)
    Muon([matrix]).step()
    assert torch.equal(matrix, before)


def test_matrices_step_as_in_torch_and_the_rest_as_with_adamw() -> None:
    mine, other = parameters(), parameters()
    steps(Muon(mine, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, momentum=0.9), 10)
    count = len(MATRICES)
    flat = [nn.Parameter(parameter.detach().flatten(1)) for parameter in other[:count]]
    peers = [
        torch.optim.Muon(flat, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other[count:], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    draw = torch.Generator().manual_seed(0)
    for _ in range(10):
        for shape, parameter in zip(MATRICES + OTHERS, flat + other[count:], strict=True):
            parameter.grad = torch.randn(shape, generator=draw).view_as(parameter)
        for peer in peers:
            peer.step()
    for number, (a, b, start) in enumerate(zip(mine, flat + other[count:], parameters(), strict=True)):
        moved = (a - start).abs().max().item()
        # torch multiplies in bfloat16, whose numbers are 1/128 apart.
        torch.testing.assert_close(a.view_as(b), b, rtol=0, atol=0.02 * moved if number < count else 1e-6)


def test_a_restored_step_count_is_on_its_parameters_device() -> None:
    optimizer = Muon(parameters())
    steps(optimizer, 2)
    there = Muon([nn.Parameter(parameter.to("meta")) for parameter in parameters()])
    there.load_state_dict(optimizer.state_dict())
    assert {value.device.type for state in there.state.values() for value in state.values()} == {"meta"}


def test_a_copy_steps_as_its_original() -> None:
    mine = parameters([(6, 5), (4, 3)])
    optimizer = Muon(mine)
    optimizer.keep_adamw(mine[1:])
    steps(optimizer, 2)
    again = copy.deepcopy(optimizer)
    for one in (optimizer, again):
        steps(one, 2, seed=1)
    for a, b in zip(mine, again.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


def test_steps_have_the_size_of_adamws() -> None:
    mine, other = parameters([(200, 100)]), parameters([(200, 100)])
    for kind, of_kind in ((Muon, mine), (torch.optim.AdamW, other)):
        steps(kind(of_kind, lr=1e-2, weight_decay=0.0), 1)
    sizes = [(x[0] - parameters([(200, 100)])[0]).square().mean().sqrt().item() / 1e-2 for x in (mine, other)]
    # AdamW's first step is 1 everywhere; later ones are 0.2 to 0.4 (Liu et al. 2025), which Muon's is from the first.
    assert 0.15 < sizes[0] < 0.25
    assert sizes[1] == pytest.approx(1.0, abs=0.01)


def test_matrices_have_their_own_learning_rate() -> None:
    plain, scaled = parameters(), parameters()
    steps(Muon(plain, lr=1e-2), 1)
    steps(Muon(scaled, lr=1e-2, matrix_lr_scale=3.0), 1)
    for number, (a, b, start) in enumerate(zip(plain, scaled, parameters(), strict=True)):
        torch.testing.assert_close(b - start, (a - start) * (3 if number < len(MATRICES) else 1), rtol=1e-4, atol=1e-6)


def test_the_number_multiplied_at_a_time_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = parameters(), parameters()
    steps(Muon(together), 3)
    monkeypatch.setattr(muon, "TOGETHER", 1)
    steps(Muon(apart), 3)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)


def layers(module: Any, with_muon: bool) -> list[tuple[str, nn.Module]]:
    """Return the names and layers of the weights that Muon steps itself, or leaves to AdamW."""
    chosen = module.configure_optimizers()
    optimizer = chosen[0] if isinstance(chosen, list) else chosen
    assert isinstance(optimizer, Muon)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return [
        (name, module.get_submodule(name.rpartition(".")[0]))
        for name, parameter in module.named_parameters()
        if parameter in held and parameter.ndim >= 2 and optimizer.is_orthogonal(parameter) == with_muon
    ]


def test_embeddings_and_heads_are_stepped_by_adamw(tiny_config: dict[str, Any]) -> None:
    module = CausalLM(tiny_config, optimizer="muon")
    assert len(layers(module, True)) == 2 * 4
    assert {name.split(".")[-2] for name, _ in layers(module, False)} == {"embed_in", "lm_head"}


def test_codebooks_and_depthwise_kernels_are_stepped_by_adamw() -> None:
    module = StageA("tiny", "tiny", perceptual_weight=0.0, optimizer="muon")
    left = layers(module, False)
    depthwise = [layer for _, layer in left if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert [name for name, layer in left if layer not in depthwise] == ["vqgan.vquantizer.embedding.weight"]
    assert len(depthwise) == 4
    kinds = {type(layer).__name__ for _, layer in layers(module, True)}
    assert kinds == {"Linear", "Conv", "Conv2d", "ConvTranspose", "Pointwise"}


def test_a_language_model_learns_in_fewer_steps_at_adamws_learning_rate(tiny_config: dict[str, Any]) -> None:
    (with_muon, _), (with_adamw, _) = (train(tiny_config, name, 120) for name in ("muon", "adamw"))
    reached = sum(with_adamw[-10:]) / 10
    assert reached < 0.6 * with_adamw[0], "it learns"
    assert sum(with_muon[70:80]) / 10 < reached


def test_wrong_use() -> None:
    for name, value in (("momentum", 1.0), ("iterations", 0), ("matrix_lr_scale", -1.0), ("betas", (0.9, 1.0))):
        with pytest.raises(UsageError, match=rf"^Muon: {name} .* must be at least 0"):
            Muon(parameters(), **{name: value})  # type: ignore[arg-type]
