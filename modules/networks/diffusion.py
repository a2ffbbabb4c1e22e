"""Continuous-time diffusion as pure functions, shared by Stage B and Stage C.

Time t runs from 0 (data) to 1 (noise). If a function takes t together with images, t has one entry per image.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ... import UsageError

Images: TypeAlias = Float[Tensor, "batch c h w"]
Times: TypeAlias = Float[Tensor, " batch"]
Randomness: TypeAlias = Generator | Sequence[Generator] | None
"""One generator for the whole batch, or one per image, so that an image does not depend on the others."""


def alpha_bar(t: Float[Tensor, "*any"], s: float = 0.008) -> Float[Tensor, "*any"]:
    """Return the signal's share of the variance at t: the cosine schedule (Nichol and Dhariwal, eq. 17), clamped."""
    offset = math.cos(s / (1 + s) * math.pi / 2) ** 2
    return (torch.cos((t + s) / (1 + s) * (math.pi / 2)) ** 2 / offset).clamp(1e-4, 0.9999)


def _per_image(t: Times) -> Float[Tensor, "batch 1 1 1"]:
    """Return alpha_bar at each image's time, shaped to broadcast over images."""
    return alpha_bar(t)[:, None, None, None]


def diffuse(x: Images, t: Times, noise: Images) -> Images:
    """Add noise to ``x`` for time t: sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise."""
    level = _per_image(t)
    return (level.sqrt() * x + (1 - level).sqrt() * noise).to(x.dtype)


def p2_weight(t: Times, k: float = 1.0, gamma: float = 1.0) -> Times:
    """Return the weight of the loss at t: (k + snr)^-gamma (Choi et al., perception prioritized training).

    With k = gamma = 1, which Stage C uses, this is 1 - alpha_bar.
    """
    level = alpha_bar(t)
    if k == gamma == 1:
        return 1 - level
    return (k + level / (1 - level)) ** -gamma


def inverse_snr_weight(t: Times, largest: float, smallest: float = 1.0) -> Times:
    """Return the weight of the noise's squared error at t: 1 / snr, clamped to [smallest, largest].

    Between the bounds this gives the data's squared error. With smallest = 1 and no upper bound, it gives the data's
    squared error times max(snr, 1) (Salimans and Ho, progressive distillation, "truncated SNR").
    """
    level = alpha_bar(t)
    return ((1 - level) / level).clamp(smallest, largest)


def noise_from_prior(x: Images, a: Images, b: Images) -> Images:
    """Compute Stage C's prediction of the noise from its two outputs: (x - a) / (|1 - b| + 1e-5)."""
    return (x - a) / ((1 - b).abs() + 1e-5)


def noise_from_unet(x: Images, a: Images, b: Images, eps: float = 1e-3) -> Images:
    """Compute Stage B's prediction of the noise from its two outputs: (x - a) / b, with b clamped to [eps, 1 - eps]."""
    return (x - a) / (b.sigmoid() * (1 - 2 * eps) + eps)


def data_from_noise(x: Images, noise: Images, t: Times) -> Images:
    """Estimate the data from the noise predicted at t, for previews and DDIM."""
    level = _per_image(t)
    return (x - (1 - level).sqrt() * noise) / level.sqrt()


def ddpm_step(x: Images, noise: Images, t: Times, t_next: Times, fresh: Images) -> Images:
    """Step from t down to ``t_next`` with ``fresh`` noise (Ho et al., algorithm 2, with the posterior's variance).

    No noise is added when ``t_next`` is 0.
    """
    now, then = _per_image(t), _per_image(t_next)
    alpha = now / then
    mean = (x - (1 - alpha) * noise / (1 - now).sqrt()) / alpha.sqrt()
    deviation = ((1 - alpha) * (1 - then) / (1 - now)).sqrt()
    return mean + deviation * fresh * (t_next != 0)[:, None, None, None]


def ddim_step(x: Images, noise: Images, t: Times, t_next: Times, fresh: Images | None = None) -> Images:
    """Step from t to ``t_next`` without new noise (Song et al., equation 12 with eta = 0); ``fresh`` is unused."""
    then = _per_image(t_next)
    return then.sqrt() * data_from_noise(x, noise, t) + (1 - then).sqrt() * noise


def guide(noise: Float[Tensor, "both c h w"], scale: float) -> Images:
    """Apply guidance: extrapolate from the unconditional (second) to the conditional (first) half of the batch."""
    conditional, unconditional = noise.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def training_times(uniform: Times) -> Times:
    """Turn uniform random numbers into training times: from 0.001 to 1, and exactly 1 in 7.5 % of cases."""
    return ((1 - uniform) * 1.08 + 0.001).clamp(0.001, 1.0)


def timesteps(steps: int) -> list[float]:
    """Return ``steps + 1`` evenly spaced times from 1 to 0."""
    times: list[float] = torch.linspace(1.0, 0.0, steps + 1).tolist()
    return times


def released_prior_timesteps() -> list[float]:
    """Return the 30 times of the release's 29 steps for Stage C: dense from 1 to 2/3, sparse below."""
    dense, sparse = torch.linspace(1.0, 2 / 3, 20).tolist(), torch.linspace(2 / 3, 0.0, 11).tolist()
    return [*dense, *sparse[1:]]


def draw(shape: Sequence[int], generator: Randomness, like: Tensor) -> Images:
    """Draw normal noise on the generators' device, and convert it to ``like``'s dtype and device.

    With several generators, image i comes from generator i. Draws are in the same order as in diffusers, so that equal
    generators give equal images.
    """
    if isinstance(generator, Sequence) and len(generator) > 1:
        if len(generator) != shape[0]:
            raise UsageError(f"got {len(generator)} generators for {shape[0]} images: give one, or one per image")
        return torch.cat([draw((1, *shape[1:]), one, like) for one in generator])
    one = generator[0] if isinstance(generator, Sequence) else generator
    device = like.device if one is None else one.device
    return torch.randn(tuple(shape), generator=one, device=device, dtype=like.dtype).to(like.device)


def sample(
    predict: Callable[[Images, Times], Images],
    x: Images,
    times: Sequence[float],
    generator: Randomness = None,
    step: Callable[[Images, Images, Times, Times, Images], Images] = ddpm_step,
    callback: Callable[[int, float, Images], Images | None] | None = None,
) -> Images:
    """Denoise ``x`` from ``times[0]`` to ``times[-1]``: the sampling loop of both stages.

    Args:
        predict: Function that predicts the noise in x at t.
        x: Initial noise, in the precision to compute the steps in.
        times: Descending times, usually from 1 to 0; there is one step fewer than times.
        generator: Generator of the noise that ``step`` adds.
        step: Sampler, ``ddpm_step`` or ``ddim_step``.
        callback: Function called after each step with its index, the time it started from and the new x; if it returns
            a value, that value replaces x.

    Raises:
        UsageError: There are fewer than two times, or they do not descend within [0, 1].
    """
    if len(times) < 2 or not all(1 >= t > t_next >= 0 for t, t_next in pairwise(times)):
        raise UsageError(f"timesteps {list(times)} are invalid: give at least two times that descend within [0, 1]")
    for index, (now, then) in enumerate(pairwise(times)):
        t, t_next = (torch.full((x.shape[0],), time, dtype=x.dtype, device=x.device) for time in (now, then))
        x = step(x, predict(x, t), t, t_next, draw(x.shape, generator, x))
        changed = callback(index, now, x) if callback else None
        x = x if changed is None else changed
    return x
