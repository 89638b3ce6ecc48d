import types

import numpy as np
import pytest
from close import assert_close

from maskdm_jax import diffusion, sampler

SIZE = (64, 64)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_equal_the_official_ones(golden_schedules, schedule):
    betas = diffusion.make_betas(schedule, 1000, SIZE)
    assert_close(betas, golden_schedules[f"{schedule}_betas"], 1e-15)
    given = types.SimpleNamespace(schedule=schedule, num_timesteps=1000)
    assert_close(
        diffusion.make_alphas_cumprod(given, SIZE),
        golden_schedules[f"{schedule}_alphas_cumprod"],
        1e-14,
    )


def test_shifted_cosine_equals_the_official_one_at_256(golden_schedules):
    betas = diffusion.make_betas("shifted_cosine", 1000, (256, 256))
    expected = golden_schedules["shifted_cosine_256_betas"]
    assert_close(betas, expected, 1e-14)


def test_shifted_cosine_is_the_cosine_at_64_pixels():
    shifted = diffusion.make_betas("shifted_cosine", 1000, (64, 64))
    assert_close(shifted, diffusion.make_betas("cosine", 1000, SIZE), 1e-12)


def test_ancestral_posterior_equals_the_official_one(golden_schedules):
    abar = np.append(golden_schedules["cosine_alphas_cumprod"][::-1], 1.0)
    ours = sampler._ddpm(abar)
    for name, expected in (
        ("x0", "cosine_posterior_mean_coef1"),
        ("x_t", "cosine_posterior_mean_coef2"),
    ):
        np.testing.assert_allclose(ours[name][::-1], golden_schedules[expected], rtol=1e-5)
    variance = golden_schedules["cosine_posterior_variance"]
    np.testing.assert_allclose(ours["sigma"][::-1] ** 2, variance, rtol=1e-5, atol=1e-12)


def test_noising_equals_the_official_code(golden):
    given = types.SimpleNamespace(schedule="cosine", num_timesteps=1000)
    abar = diffusion.make_alphas_cumprod(given, (32, 32))
    signal, noise = diffusion.signal_and_noise(abar, golden["t"], 4)
    x_t = diffusion.q_sample(2 * golden["image"] - 1, golden["noise"], signal, noise)
    assert_close(x_t, golden["x_t"], 1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_true_output_gives_back_x0_and_eps(prediction):
    generator = np.random.default_rng(0)
    x0, eps = generator.normal(size=(2, 5, 7))
    abar = np.array([0.9, 0.7, 0.5, 0.3, 0.1])
    signal, noise = np.sqrt(abar)[:, None], np.sqrt(1 - abar)[:, None]
    x_t = diffusion.q_sample(x0, eps, signal, noise)
    output = diffusion.target(prediction, x0, eps, signal, noise)
    for make, expected in ((diffusion.x0_coefficients, x0), (diffusion.eps_coefficients, eps)):
        a, b = make(prediction, abar)
        assert_close(a[:, None] * x_t + b[:, None] * output, expected, 1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "shifted_cosine"])
def test_schedules_of_other_lengths_end_in_noise(schedule):
    abar = np.cumprod(1 - diffusion.make_betas(schedule, 250, (128, 128)))
    assert len(abar) == 250 and (np.diff(abar) < 0).all()
    assert abar[0] > 0.99 and abar[-1] < 1e-3
