"""The diffusion's functions equal diffusers' scheduler, and have their mathematical properties."""

from typing import Any

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import DEFAULT_STAGE_C_TIMESTEPS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from rewurst import UsageError
from rewurst.modules.networks import diffusion

times = st.floats(0, 1, width=32)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("schedule", [diffusion.timesteps(7), diffusion.released_prior_timesteps()])
def test_sampling_equals_the_scheduler_step_by_step(schedule: list[float]) -> None:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        return 0.8 * x + t[:, None, None, None]

    scheduler, generator = DDPMWuerstchenScheduler(), Generator().manual_seed(3)
    scheduler.set_timesteps(timesteps=schedule)
    start = torch.randn(2, 3, 4, 5)
    x, expected = start, []
    for t in scheduler.timesteps[:-1]:
        ratio = t.expand(2)
        x = scheduler.step(predict(x, ratio), ratio, x, generator=generator).prev_sample
        expected.append(x)
    ours: list[Tensor] = []
    end = diffusion.sample(
        predict, start, schedule, Generator().manual_seed(3), callback=lambda i, t, x: ours.append(x)
    )
    assert len(ours) == len(expected) == len(schedule) - 1
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(end, ours[-1])


def test_timesteps_equal_the_schedulers() -> None:
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(60)
    assert torch.equal(torch.tensor(diffusion.timesteps(60)), scheduler.timesteps)
    torch.testing.assert_close(
        torch.tensor(diffusion.released_prior_timesteps()), torch.tensor(DEFAULT_STAGE_C_TIMESTEPS).float()
    )


def test_noising_equals_the_schedulers() -> None:
    x, noise, t = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    torch.testing.assert_close(diffusion.diffuse(x, t, noise), DDPMWuerstchenScheduler().add_noise(x, noise, t))


@given(times, times)
def test_alpha_bar_is_monotone_and_clamped(one: float, other: float) -> None:
    early, late = diffusion.alpha_bar(vector(*sorted((one, other))))
    assert 0.9999 >= early >= late >= 1e-4


@given(times)
def test_p2_is_one_minus_alpha_bar(t: float) -> None:
    exact = 1 - diffusion.alpha_bar(vector(t))
    assert torch.equal(diffusion.p2_weight(vector(t)), exact)
    torch.testing.assert_close(diffusion.p2_weight(vector(t), k=1 + 1e-12), exact)


@settings(deadline=None)
@given(times, st.integers(0, 2**31))
def test_ddim_from_t_to_t_is_the_identity(t: float, seed: int) -> None:
    x, noise = torch.randn(2, 1, 2, 3, 3, generator=Generator().manual_seed(seed)).double()
    torch.testing.assert_close(diffusion.ddim_step(x, noise, vector(t), vector(t)), x)


@settings(deadline=None)
@given(times, times, st.integers(0, 2**31))
def test_ddim_with_the_true_noise_follows_the_diffusion(t: float, t_next: float, seed: int) -> None:
    data, noise = torch.randn(2, 1, 2, 3, 3, generator=Generator().manual_seed(seed)).double()
    now = diffusion.diffuse(data, vector(t), noise)
    then = diffusion.ddim_step(now, noise, vector(t), vector(t_next))
    torch.testing.assert_close(then, diffusion.diffuse(data, vector(t_next), noise))
    torch.testing.assert_close(diffusion.data_from_noise(now, noise, vector(t)), data)


def test_training_times() -> None:
    times = diffusion.training_times(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert times.min() == 0.001
    assert times.max() == 1
    assert (times == 1).double().mean().item() == pytest.approx(0.075, abs=0.001)


def test_ddpm_adds_no_noise_at_the_end() -> None:
    x, noise, fresh = torch.randn(3, 1, 2, 3, 3)
    t, zero = torch.tensor([0.1]), torch.tensor([0.0])
    assert torch.equal(diffusion.ddpm_step(x, noise, t, zero, fresh), diffusion.ddpm_step(x, noise, t, zero, -fresh))


def test_ddpm_keeps_the_marginal() -> None:
    """With the exact noise of a single data point, a step lands on the diffusion's distribution."""
    generator = Generator().manual_seed(0)
    data, shape = 0.7, (1, 1, 400, 400)
    x0 = torch.full(shape, data).double()
    t, t_next = vector(0.8), vector(0.4)
    noise, fresh = (torch.randn(shape, generator=generator).double() for _ in range(2))
    x = diffusion.ddpm_step(diffusion.diffuse(x0, t, noise), noise, t, t_next, fresh)
    level = diffusion.alpha_bar(t_next)
    assert x.mean().item() == pytest.approx((level.sqrt() * data).item(), abs=0.01)
    assert x.var().item() == pytest.approx((1 - level).item(), abs=0.01)


def test_guidance_is_a_lerp_from_the_second_half_to_the_first() -> None:
    wanted, unwanted = torch.randn(2, 1, 2, 3, 3)
    both = torch.cat([wanted, unwanted])
    torch.testing.assert_close(diffusion.guide(both, 4.0), unwanted + 4 * (wanted - unwanted))
    torch.testing.assert_close(diffusion.guide(both, 1.0), wanted)


def test_each_image_has_its_own_randomness() -> None:
    def run(seeds: list[int]) -> Tensor:
        generators = [Generator().manual_seed(seed) for seed in seeds]
        start = diffusion.draw((len(seeds), 2, 3, 3), generators, torch.empty(0))
        return diffusion.sample(lambda x, t: x * 0.5, start, diffusion.timesteps(4), generators)

    together = run([5, 6])
    assert torch.equal(together, torch.cat([run([5]), run([6])]))
    assert not torch.equal(together[0], together[1])


def test_a_callback_may_replace_the_sample() -> None:
    seen = []

    def callback(index: int, time: float, x: Tensor) -> Tensor:
        seen.append((index, time))
        return torch.zeros_like(x)

    out = diffusion.sample(lambda x, t: x, torch.randn(1, 1, 2, 2), [1.0, 0.5, 0.0], callback=callback)
    assert seen == [(0, 1.0), (1, 0.5)]
    assert not out.any()


def test_ddim_sampling_is_deterministic() -> None:
    start = torch.randn(1, 1, 4, 4)
    runs = [diffusion.sample(lambda x, t: x * 0.3, start, diffusion.timesteps(3), step=diffusion.ddim_step)] * 2
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: diffusion.sample(lambda x, t: x, x, [1.0]), "timesteps [1.0] are invalid: give at least two"),
        (lambda x: diffusion.sample(lambda x, t: x, x, [0.5, 1.0]), "timesteps [0.5, 1.0] are invalid"),
        (lambda x: diffusion.sample(lambda x, t: x, x, [2.0, 0.0]), "within [0, 1]"),
        (lambda x: diffusion.draw(x.shape, [Generator(), Generator()], x), "got 2 generators for 3 images"),
    ],
)
def test_bad_input(run: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        run(torch.zeros(3, 1, 2, 2))
    assert message in str(error.value)
