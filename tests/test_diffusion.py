import types

import jax
import numpy as np
import pytest
from close import assert_close

from maskdm_jax.diffusion import ddpm, make_process, process, samplers

SIZE = (64, 64)


def settings(schedule="cosine", num_timesteps=1000, prediction="eps", draw="uniform", **fields):
    return types.SimpleNamespace(
        framework="ddpm",
        schedule=schedule,
        num_timesteps=num_timesteps,
        prediction=prediction,
        draw=draw,
        **fields,
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_equal_the_official_ones(golden_schedules, schedule):
    betas = ddpm.make_betas(schedule, 1000, SIZE)
    assert_close(betas, golden_schedules[f"{schedule}_betas"], 1e-15)
    np.testing.assert_allclose(
        ddpm.make_alphas_cumprod(settings(schedule), SIZE),
        golden_schedules[f"{schedule}_alphas_cumprod"],
        1e-14,
    )


def test_shifted_cosine_equals_the_official_one_at_256(golden_schedules):
    betas = ddpm.make_betas("shifted_cosine", 1000, (256, 256))
    expected = golden_schedules["shifted_cosine_256_betas"]
    assert_close(betas, expected, 1e-14)


def test_shifted_cosine_is_the_cosine_at_64_pixels():
    shifted = ddpm.make_betas("shifted_cosine", 1000, (64, 64))
    assert_close(shifted, ddpm.make_betas("cosine", 1000, SIZE), 1e-12)


def test_ancestral_posterior_equals_the_official_one(golden_schedules):
    # A walk of all 1000 steps has the posteriors of single steps.
    ours = samplers.ancestral(make_process(settings(), SIZE).ladder(1000, "timestep"))
    for name, expected in (
        ("x0", "cosine_posterior_mean_coef1"),
        ("x_t", "cosine_posterior_mean_coef2"),
    ):
        np.testing.assert_allclose(ours[name][::-1], golden_schedules[expected], rtol=1e-5)
    assert_close(ours["noise"][::-1] ** 2, golden_schedules["cosine_posterior_variance"], 1e-5)


def test_noising_equals_the_official_code(golden):
    level = make_process(settings(), (32, 32)).at(golden["t"])
    x_t = process.noised(level, 2 * golden["image"] - 1, golden["noise"])
    assert_close(x_t, golden["x_t"], 1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_true_output_recovers_x0_and_eps(prediction):
    x0, eps = np.random.default_rng(0).normal(size=(2, 5))
    level = make_process(settings(prediction=prediction), SIZE).ladder(5, "timestep")
    x_t = process.noised(level, x0, eps)
    output = process.target(level, x0, eps)
    back = process.x0_and_eps(process.invert(level), x_t, output)
    assert_close(back[0], x0, 1e-6)
    assert_close(back[1], eps, 1e-12)


@pytest.mark.parametrize("prediction, expected", [("eps", "eps"), ("x0", "x0"), ("v", "v")])
def test_each_prediction_is_trained_towards_its_own_target(prediction, expected):
    x0, eps = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    level = make_process(settings(prediction=prediction), SIZE).at(np.array([0, 500, 999]))
    v = level.signal[:, None] * eps - level.noise[:, None] * x0
    target = process.target(level, x0, eps)
    assert_close(target, {"eps": eps, "x0": x0, "v": v}[expected], 1e-5)


def test_training_draws_every_timestep_equally_often():
    t = np.asarray(make_process(settings(num_timesteps=50), SIZE).draw(jax.random.key(0), 50_000))
    counts = np.bincount(t, minlength=50)
    assert len(counts) == 50 and np.abs(counts - 1000).max() < 5 * 1000**0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "shifted_cosine"])
@pytest.mark.parametrize("mean, std", [(-0.8, 0.8), (0.5, 1.2)])
def test_logit_normal_draws_have_the_chosen_mean_and_spread(schedule, mean, std):
    made = make_process(settings(schedule, draw="logit_normal", draw_mean=mean, draw_std=std), SIZE)
    n = 20_000
    t = made.draw(jax.random.key(0), n)
    level = made.at(t)
    drawn = np.sort(np.log(np.float64(level.signal) / level.noise))
    assert t.dtype == np.int32 and abs(drawn.mean() - mean) < 5 * std / n**0.5
    assert abs(drawn.std() / std - 1) < 5 / (2 * n) ** 0.5
    # And the shape: quantiles of a normal distribution.
    for z, share in ((-1.0, 0.158655), (1.0, 0.841345), (1.5, 0.933193)):
        assert abs(np.mean(drawn < mean + z * std) - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_a_logit_normal_draw_is_the_nearest_timestep_and_stops_at_the_ends():
    fields = dict(draw="logit_normal", draw_mean=-0.5, draw_std=3.0)
    made = make_process(settings(num_timesteps=50, **fields), SIZE)
    level = made.at(np.arange(50))
    table = np.log(np.float64(level.signal) / level.noise)
    t = np.asarray(made.draw(jax.random.key(1), 3000))
    wanted = -0.5 + 3.0 * np.asarray(jax.random.normal(jax.random.key(1), (3000,)))
    np.testing.assert_array_equal(t, np.abs(table - wanted[:, None]).argmin(axis=1))
    assert (t[wanted > table[0]] == 0).all() and (wanted > table[0]).any()
    low = make_process(settings(**(fields | dict(draw_mean=-99.0))), SIZE)
    assert (np.asarray(low.draw(jax.random.key(1), 10)) == 999).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "shifted_cosine"])
def test_schedules_of_other_lengths_end_in_noise(schedule):
    abar = np.cumprod(1 - ddpm.make_betas(schedule, 250, (128, 128)))
    assert len(abar) == 250 and (np.diff(abar) < 0).all()
    assert abar[0] > 0.99 and abar[-1] < 1e-3


def test_the_official_walk_ends_at_the_clean_image():
    np.testing.assert_array_equal(
        ddpm.timesteps(1000, 10), [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]
    )
    np.testing.assert_array_equal(ddpm.timesteps(20, 20), np.arange(19, -2, -1))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "shifted_cosine"])
@pytest.mark.parametrize("steps", [1, 10, 300])
def test_a_log_snr_ladder_is_even_in_log_snr_between_the_ends(schedule, steps):
    made = make_process(settings(schedule), (128, 128))
    levels, ends = made.ladder(steps, "log_snr"), made.ladder(1000, "timestep")
    log_snr = np.log(levels.signal / levels.noise)
    assert len(log_snr) == len(levels.time) == steps
    noisiest = np.log(ends.signal[0] / ends.noise[0])
    assert_close(log_snr[0], max(noisiest, -5.1), 1e-6)  # beyond that no image is left
    assert_close(levels.signal**2 + levels.noise**2, 1, 1e-12)
    if steps > 1:
        assert_close(np.diff(log_snr), np.diff(log_snr)[0], 1e-6)
        assert (levels.time[0] == 999) == (noisiest >= -5.1) and abs(levels.time[-1]) < 1e-9
        assert (np.diff(levels.time) < 0).all()
