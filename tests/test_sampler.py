import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax import diffusion, patches, sampler, uvit

COSINE = types.SimpleNamespace(schedule="cosine", num_timesteps=1000)
ABAR = diffusion.make_alphas_cumprod(COSINE, (32, 32))


def test_ddim_with_the_official_noises_gives_the_official_samples(golden, official_model):
    model, params = official_model
    noises = jnp.asarray(np.moveaxis(golden["ddim_noises"], -3, -1))
    noises = jnp.concatenate([noises, jnp.zeros_like(noises[:1])])  # the last step adds none

    def predict(x_t, t_B):
        tokens = uvit.apply(model, params, patches.patchify(x_t, 4), t_B)
        return patches.unpatchify(tokens, 4, (32, 32))

    draw = jax.jit(
        lambda noises: sampler.sample(
            predict, noises[0], lambda i: noises[i + 1], ABAR, steps=10, eta=1.0
        )
    )
    ours = (np.asarray(draw(noises)) + 1) / 2
    np.testing.assert_allclose(ours, np.moveaxis(golden["ddim_samples"], -3, -1), atol=1e-4)


def test_timesteps_end_at_the_clean_image():
    np.testing.assert_array_equal(
        sampler.timesteps(1000, 10), [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]
    )
    np.testing.assert_array_equal(sampler.timesteps(20, 20), np.arange(19, -2, -1))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddim_with_the_true_noise_recovers_x0(prediction):
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 3)), jnp.float32)
    abar = np.cumprod(1 - diffusion.make_betas("linear", 1000, (8, 8)))

    def predict(x_t, t_B):
        signal, noise = diffusion.signal_and_noise(abar, t_B, 2)
        return diffusion.target(prediction, x0, (x_t - signal * x0) / noise, signal, noise)

    x_T = jax.random.normal(jax.random.key(0), x0.shape)
    drawn = sampler.sample(predict, x_T, None, abar, steps=25, eta=0.0, prediction=prediction)
    np.testing.assert_allclose(drawn, x0, atol=1e-3)


def gaussian_predictor(mean, std, abar):
    """The best eps for data N(mean, std^2): known in closed form."""

    def predict(x_t, t_B):
        signal, noise = diffusion.signal_and_noise(abar, t_B, x_t.ndim)
        return noise * (x_t - signal * mean) / (signal**2 * std**2 + noise**2)

    return predict


@pytest.mark.parametrize(
    "settings",
    [dict(sampler="ddpm"), dict(sampler="ddim", eta=1.0), dict(sampler="ddim", eta=0.0)],
    ids=str,
)
def test_samplers_approach_the_true_distribution_as_steps_grow(settings):
    abar = np.cumprod(1 - diffusion.make_betas("linear", 1000, (8, 8)))
    predict = gaussian_predictor(0.3, 0.1, abar)
    shape = (20_000,)
    key = jax.random.key(0)

    def normal(i):
        return jax.random.normal(jax.random.fold_in(key, i), shape)

    std = {}
    for steps in (20, 1000):
        draw = jax.jit(
            lambda steps=steps: sampler.sample(
                predict, normal(0), lambda i: normal(i + 1), abar, steps=steps, **settings
            )
        )
        drawn = np.asarray(draw())
        np.testing.assert_allclose(drawn.mean(), 0.3, atol=5e-3)
        std[steps] = drawn.std()
    np.testing.assert_allclose(std[1000], 0.1, rtol=0.04)
    assert abs(std[20] - 0.1) > abs(std[1000] - 0.1)


def test_samples_stay_in_range_when_the_network_is_wrong():
    abar = np.cumprod(1 - diffusion.make_betas("cosine", 1000, (8, 8)))
    x_T = jax.random.normal(jax.random.key(0), (4, 5))
    drawn = sampler.sample(lambda x, t: 50 * x, x_T, None, abar, steps=5, eta=0.0)
    assert np.abs(drawn).max() <= 1


def test_guidance_extrapolates_from_the_unconditional_output():
    def predict_label(x_t, t_B, label_B):
        return jnp.where(label_B == 10, 1.0, 3.0)[:, None] * x_t

    x = jnp.ones((2, 4))
    t = jnp.zeros((2,), jnp.int32)
    guided = sampler.guided(predict_label, jnp.asarray([4, 7]), 10, 2.5)
    np.testing.assert_allclose(guided(x, t), 1 + 2.5 * (3 - 1))
    plain = sampler.guided(predict_label, jnp.asarray([4, 7]), 10, 1.0)
    np.testing.assert_allclose(plain(x, t), 3)
