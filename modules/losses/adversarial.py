"""Losses of a discriminator and its generator, as pure functions of logits (positive: real)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Logits: TypeAlias = Float[Tensor, "batch 1 h w"]
AdversarialLoss: TypeAlias = Literal["hinge", "non_saturating"]


def hinge_discriminator(real: Logits, fake: Logits) -> Float[Tensor, ""]:
    """Return max(0, 1 - D(x)) + max(0, 1 + D(G)), each a mean over patches (Lim and Ye, Geometric GAN)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Logits) -> Float[Tensor, ""]:
    """Return -D(G), a mean over patches."""
    return -fake.mean()


def non_saturating_discriminator(real: Logits, fake: Logits) -> Float[Tensor, ""]:
    """Return -log sigmoid(D(x)) - log(1 - sigmoid(D(G))), each a mean over patches (Goodfellow et al., equation 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating_generator(fake: Logits) -> Float[Tensor, ""]:
    """Return -log sigmoid(D(G)), a mean over patches (Goodfellow et al., section 3)."""
    return F.softplus(-fake).mean()


class Adversarial(NamedTuple):
    """Losses of a discriminator and its generator.

    Attributes:
        discriminator: Loss of real and fake logits.
        generator: Loss of fake logits.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


ADVERSARIAL: dict[str, Adversarial] = {
    "hinge": Adversarial(hinge_discriminator, hinge_generator),
    "non_saturating": Adversarial(non_saturating_discriminator, non_saturating_generator),
}


@contextmanager
def without_gradients(network: nn.Module) -> Iterator[None]:
    """Let gradients pass through a network but not into its parameters, to train the generator."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
