"""Adversarial and perceptual losses compared with other implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import vgg16

from rewurst import UsageError
from rewurst.modules.losses import perceptual
from rewurst.modules.losses.adversarial import ADVERSARIAL
from rewurst.modules.losses.perceptual import LPIPS
from rewurst.modules.shared.image_metrics import psnr, ssim


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8), st.lists(st.floats(-30, 30), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_adversarial_losses_are_the_papers(real: list[float], fake: list[float]) -> None:
    x, g = (torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1) for values in (real, fake))
    hinge, non_saturating = ADVERSARIAL["hinge"], ADVERSARIAL["non_saturating"]
    mean = sum(max(0, 1 - v) for v in real) / len(real) + sum(max(0, 1 + v) for v in fake) / len(fake)
    assert hinge.discriminator(x, g).item() == pytest.approx(mean)
    assert hinge.generator(g).item() == pytest.approx(-sum(fake) / len(fake))
    ones, zeros = torch.ones_like(x), torch.zeros_like(g)
    entropy = F.binary_cross_entropy_with_logits
    assert non_saturating.discriminator(x, g).item() == pytest.approx((entropy(x, ones) + entropy(g, zeros)).item())
    assert non_saturating.generator(g).item() == pytest.approx(entropy(g, torch.ones_like(g)).item())


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write random weights in the layout of torchvision's file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    features = vgg16().features.state_dict()
    torch.save({f"features.{name}": tensor for name, tensor in features.items()}, path)
    return path


def test_lpips_is_that_of_torchmetrics(vgg_file: Path) -> None:
    ours = LPIPS.from_files(vgg_file)
    assert ours is not None
    theirs: Any = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    state = {name.removeprefix("features."): t for name, t in torch.load(vgg_file, weights_only=True).items()}
    for index in range(1, 6):
        part = getattr(theirs.net, f"slice{index}")
        part.load_state_dict({name: state[name] for name in part.state_dict()})
    images, targets = torch.rand(2, 3, 48, 32), torch.rand(2, 3, 48, 32)
    targets[1] = images[1]
    with torch.no_grad():
        expected = theirs(images, targets, normalize=True).flatten()
    images.requires_grad_()
    distance = ours(images, targets)
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-7)
    assert distance[1].item() == 0
    distance.sum().backward()
    assert images.grad is not None
    assert images.grad[0].abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_weights_that_are_missing_or_of_another_network(vgg_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(perceptual, "cached_vgg16", lambda: tmp_path / "none.pth")
    assert LPIPS.from_files() is None
    monkeypatch.setattr(perceptual, "cached_vgg16", lambda: vgg_file)
    assert LPIPS.from_files() is not None
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"other.pth does not have VGG16's features.0.weight: give torchvision's"):
        LPIPS.from_files(tmp_path / "other.pth")


def test_metrics_by_image() -> None:
    targets = torch.rand(3, 3, 24, 24)
    images = targets + torch.tensor([0.1, 0.01, 0.2])[:, None, None, None] * torch.randn(3, 3, 24, 24)
    errors = (images.clamp(0, 1) - targets).square().mean((1, 2, 3))
    torch.testing.assert_close(psnr(images, targets), -10 * errors.log10())
    assert ssim(targets, targets).tolist() == pytest.approx([1, 1, 1])
    first = ssim(images[:1], targets[:1])
    torch.testing.assert_close(ssim(images, targets)[:1], first)
