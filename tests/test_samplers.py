import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from maskdm_jax.diffusion import make_process, process, samplers
from maskdm_jax.model import patches, uvit


def ddpm(schedule="linear", prediction="eps"):
    settings = types.SimpleNamespace(
        framework="ddpm", schedule=schedule, num_timesteps=1000, prediction=prediction
    )
    return make_process(settings, (32, 32))


def edm(data_std=0.5):
    settings = types.SimpleNamespace(
        framework="edm", sigma_data=data_std, edm_mean=-1.2, edm_std=1.2,
        sigma_min=0.002, sigma_max=80.0, rho=7.0,
    )  # fmt: skip
    return make_process(settings, (32, 32))


def test_ddim_with_the_official_noises_gives_the_official_samples(golden, official_model):
    model, params = official_model
    noises = jnp.asarray(np.moveaxis(golden["ddim_noises"], -3, -1))
    noises = jnp.concatenate([noises, jnp.zeros_like(noises[:1])])  # the last step adds none
    noises = jnp.stack([patches.patchify(noise, 4) for noise in noises])

    def predict(x_t, t_B):
        return uvit.apply(model, params, x_t, t_B)

    levels = ddpm("cosine").ladder(10, "timestep")
    drawn = jax.jit(lambda: samplers.walk(predict, noises[0], lambda i: noises[i + 1], levels))()
    ours = (np.asarray(patches.unpatchify(drawn, 4, (32, 32))) + 1) / 2
    assert_close(ours, np.moveaxis(golden["ddim_samples"], -3, -1), 1e-4)


def best_output(level_at, mean, std):
    """(scaled x_t, time) -> output of the best network for data N(mean, std^2)."""

    def predict(x_in, time_B):
        level = level_at(time_B)
        x_t = x_in / level.scale
        signal, noise = level.signal, level.noise
        eps = noise * (x_t - signal * mean) / (signal**2 * std**2 + noise**2)
        return level.p * (x_t - noise * eps) / signal + level.q * eps

    return predict


def frameworks():
    """name: (process, time -> its level)."""
    made = {name: ddpm(prediction=name) for name in ("eps", "x0", "v")}
    found = {name: (process, process.at) for name, process in made.items()}
    return found | {"edm": (edm(), lambda time: edm().at(jnp.exp(time / 100)))}


def drawn(made, predict, count, steps, spacing="timestep", **settings):
    key = jax.random.key(0)

    def normal(i):
        return jax.random.normal(jax.random.fold_in(key, i), (count,))

    levels = made.ladder(steps, spacing)
    draw = jax.jit(
        lambda: samplers.walk(predict, normal(0), lambda i: normal(i + 1), levels, **settings)
    )
    return np.asarray(draw())


@pytest.mark.parametrize("framework", ["eps", "x0", "v", "edm"])
@pytest.mark.parametrize(
    "settings",
    [dict(sampler="ddpm"), dict(sampler="ddim", eta=1.0), dict(sampler="ddim", eta=0.0)],
    ids=["ddpm", "ddim-eta-1", "ddim-eta-0"],
)
def test_samplers_approach_the_true_distribution_as_steps_grow(framework, settings):
    made, level_at = frameworks()[framework]
    predict = best_output(level_at, 0.3, 0.1)
    std = {}
    for steps in (20, 1000):
        images = drawn(made, predict, 20_000, steps, **settings)
        assert_close(images.mean(), 0.3, 0.02)
        std[steps] = images.std()
    assert_close(std[1000], 0.1, 0.04)
    assert abs(std[20] - 0.1) > abs(std[1000] - 0.1)


def test_the_log_snr_ladder_reaches_the_true_spread_too():
    # Its times lie between timesteps, so this finds their levels by interpolation.
    def level_at(time_B):
        made = ddpm()
        low, high = (made.at(f(time_B).astype(jnp.int32)) for f in (jnp.floor, jnp.ceil))
        log_snr = [jnp.log(level.signal / level.noise) for level in (low, high)]
        here = log_snr[0] + (time_B - jnp.floor(time_B)) * (log_snr[1] - log_snr[0])
        signal, noise = jax.nn.sigmoid(2 * here) ** 0.5, jax.nn.sigmoid(-2 * here) ** 0.5
        return process.Level(signal, noise, 0.0, 1.0, 1.0, time_B)

    predict = best_output(level_at, 0.3, 0.1)
    stds = [
        drawn(ddpm(), predict, 20_000, steps, "log_snr", eta=0.0).std() for steps in (10, 20, 200)
    ]
    errors = np.abs(np.array(stds) - 0.1)
    assert errors[0] > errors[1] > errors[2]
    assert_close(stds[-1], 0.1, 0.02)


@pytest.mark.parametrize("framework", ["eps", "x0", "v", "edm"])
def test_ddim_with_the_true_noise_recovers_x0(framework):
    made, level_at = frameworks()[framework]
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (12,)), jnp.float32)

    def predict(x_in, time_B):
        level = level_at(time_B)
        eps = (x_in / level.scale - level.signal * x0) / level.noise
        return level.p * x0 + level.q * eps

    x_T = jax.random.normal(jax.random.key(0), x0.shape)
    images = samplers.walk(predict, x_T, None, made.ladder(25, "timestep"), eta=0.0)
    assert_close(images, x0, 1e-3)


def test_samples_stay_in_range_when_the_network_is_wrong():
    x_T = jax.random.normal(jax.random.key(0), (4, 5))
    levels = ddpm("cosine").ladder(5, "timestep")
    images = samplers.walk(lambda x, t: 50 * x, x_T, None, levels, eta=0.0)
    assert np.abs(images).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_evaluations_is_how_often_a_sampler_calls_the_network(sampler):
    calls = []

    def predict(x_t, time_B):
        jax.debug.callback(lambda: calls.append(1))
        return x_t

    levels = ddpm().ladder(7, "timestep")
    x_T = jnp.ones((2, 3))
    jax.block_until_ready(samplers.walk(predict, x_T, lambda i: x_T, levels, sampler=sampler))
    jax.effects_barrier()
    assert len(calls) == samplers.evaluations(sampler, 7)


def test_guidance_extrapolates_from_the_unconditional_output():
    def predict_label(x_t, t_B, label_B):
        return jnp.where(label_B == 10, 1.0, 3.0)[:, None] * x_t

    x = jnp.ones((2, 4))
    t = jnp.zeros((2,), jnp.int32)
    guided = samplers.guided(predict_label, jnp.asarray([4, 7]), 10, 2.5)
    np.testing.assert_allclose(guided(x, t), 1 + 2.5 * (3 - 1))
    plain = samplers.guided(predict_label, jnp.asarray([4, 7]), 10, 1.0)
    np.testing.assert_allclose(plain(x, t), 3)
