"""Chunked cross-entropy compared with PyTorch's over all logits: value, gradient, precision and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewurst import UsageError
from rewurst.modules.losses.cross_entropy import chunk_size, linear_cross_entropy

VOCABULARY, WIDTH = 11, 5


def inputs(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [hidden, weight, torch.randint(VOCABULARY, (tokens,), generator=generator), bias]


def over_all_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, z_loss: float, reduction: str
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    losses = losses + z_loss * logits.logsumexp(-1).square() * (targets != -100)
    counted = (targets != -100).sum().clamp(min=1)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted}[reduction]


@given(
    tokens=st.integers(1, 12), chunk=st.integers(1, 13), ignored=st.integers(0, 3), z_loss=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["none", "mean", "sum"]), biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_equals_the_loss_over_all_logits(
    tokens: int, chunk: int, ignored: int, z_loss: float, reduction: Any, biased: bool, seed: int
) -> None:
    hidden, weight, targets, bias = inputs(tokens, seed)
    targets[:ignored] = -100
    leaves = [hidden, weight, bias] if biased else [hidden, weight]
    results = []
    for ours in (True, False):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        arguments: list[Any] = [own[0], own[1], targets, own[2] if biased else None]
        if ours:
            loss = linear_cross_entropy(*arguments, z_loss=z_loss, reduction=reduction, chunk_tokens=chunk)
        else:
            loss = over_all_logits(*arguments, z_loss, reduction)
        upstream = torch.arange(1.0, loss.numel() + 1, dtype=torch.float64).view(loss.shape)
        loss.backward(upstream)
        results.append((loss.detach(), *(leaf.grad for leaf in own)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients_are_those_of_finite_differences(reduction: Any) -> None:
    hidden, weight, targets, bias = inputs(7)
    targets[2] = -100
    leaves = tuple(leaf.requires_grad_() for leaf in (hidden, weight, bias))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias, z_loss=0.01, reduction=reduction, chunk_tokens=3)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_tensors_that_require_a_gradient_get_one(wanted: tuple[bool, bool], reduction: Any) -> None:
    hidden, weight, targets, _ = inputs(6)
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == wanted
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_a_tied_weight_gets_both_gradients() -> None:
    _, weight, targets, _ = inputs(6)
    weight.requires_grad_()
    results = []
    for loss in (linear_cross_entropy, F.cross_entropy):
        hidden = F.embedding(targets.roll(1), weight)
        value = loss(hidden, weight, targets) if loss is linear_cross_entropy else loss(hidden @ weight.T, targets)
        results.append(torch.autograd.grad(value, weight)[0])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_backward_twice_and_several_dimensions() -> None:
    hidden, weight, targets, _ = inputs(6)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden.view(2, 3, WIDTH), weight, targets.view(2, 3))
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])
    assert linear_cross_entropy(hidden.view(2, 3, WIDTH), weight, targets.view(2, 3), reduction="none").shape == (2, 3)


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    hidden, weight, targets, _ = inputs(4)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_logits_beyond_the_range_of_exp() -> None:
    hidden, weight, targets, _ = inputs(8, dtype=torch.float32)
    hidden *= 1e4
    ours = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(ours, F.cross_entropy(hidden @ weight.T, targets))
    assert ours > 100


class TestLowPrecision:
    """bfloat16 products with float32 sums, against float64 on the same rounded inputs."""

    def exact(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wide = weight.detach().double().requires_grad_()
        loss = F.cross_entropy(hidden.double() @ wide.T, targets)
        return loss.detach(), torch.autograd.grad(loss, wide)[0]

    def test_sums_of_many_chunks_are_kept_in_float32(self) -> None:
        hidden, weight, targets, _ = inputs(2048, dtype=torch.bfloat16)
        weight.requires_grad_()
        loss, gradient = self.exact(hidden, weight, targets)
        ours = linear_cross_entropy(hidden, weight, targets, chunk_tokens=8)
        ours.backward()
        assert ours.dtype == torch.float32
        assert weight.grad is not None
        assert weight.grad.dtype == torch.bfloat16
        assert abs(ours.item() / loss.item() - 1) < 1e-3
        # A sum of 256 chunks in bfloat16 loses small addends: its error is 0.014 here.
        assert ((weight.grad.double() - gradient).norm() / gradient.norm()).item() < 6e-3

    def test_autocast_rounds_products_and_returns_float32(self) -> None:
        hidden, weight, targets, _ = inputs(64, dtype=torch.float32)
        weight.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets)
        loss.backward()
        rounded = self.exact(hidden.bfloat16(), weight.bfloat16(), targets)
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert loss.item() == pytest.approx(rounded[0].item(), rel=2e-3)
        assert loss.item() != linear_cross_entropy(hidden, weight, targets).item()


def test_never_all_logits() -> None:
    tokens, vocabulary, width = 4096, 3001, 8
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                largest = max(largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return result

    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    for reduction in ("mean", "none"):
        with Watch():
            loss = linear_cross_entropy(hidden, weight, torch.randint(vocabulary, (tokens,)), reduction=reduction)  # type: ignore[arg-type]
            loss.sum().backward()
    assert largest == 512 * vocabulary


@pytest.mark.parametrize(
    ("vocabulary", "width", "expected"),
    [(50304, 512, 512), (50304, 128, 512), (50304, 4096, 4096), (2_000_000, 4096, 268), (2**30, 8, 1)],
)
def test_chunks_follow_the_sizes(vocabulary: int, width: int, expected: int) -> None:
    assert chunk_size(vocabulary, width) == expected


def test_within_a_compiled_function() -> None:
    hidden, weight, targets, _ = inputs(6)
    weight.requires_grad_()

    def loss(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, targets) * 3

    compiled = torch.compile(loss, backend="eager")
    results = [torch.autograd.grad(function(hidden), weight)[0] for function in (loss, compiled)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(5, dtype=torch.long)}, r"hidden states \(4, 5\), head \(11, 5\) and targets \(5,\)"),
        ({"weight": torch.zeros(3, 4)}, r"head \(3, 4\)"),
        ({"reduction": "median"}, "reduction 'median' must be"),
        ({"chunk_tokens": 0}, "chunk_tokens 0 must be at least 1"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    hidden, weight, targets, _ = inputs(4)
    with pytest.raises(UsageError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "targets": targets, **change})
