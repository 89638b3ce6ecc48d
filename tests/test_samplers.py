import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from maskdm_jax.diffusion import ddpm as ddpm_lib
from maskdm_jax.diffusion import make_process, process, samplers
from maskdm_jax.model import patches, uvit

# A Gaussian mixture: weights, means and standard deviations. Its best network is known.
WEIGHT, MEAN, STD = np.array([[0.4, 0.6], [-0.5, 0.4], [0.15, 0.1]])
SAMPLERS = {
    "ddim-eta-0": dict(sampler="ddim", eta=0.0),
    "ddim-eta-1": dict(sampler="ddim", eta=1.0),
    "ddpm": dict(sampler="ddpm"),
    "dpm_solver": dict(sampler="dpm_solver"),
    "heun": dict(sampler="heun"),
}
FRAMEWORKS = ("eps", "x0", "v", "cosine", "edm")

# Errors of docs/sampling.md's table: root mean square distance from a fine walk, by steps.
STEPS = (20, 40, 80, 160)
ERRORS = {
    ("ddim", "log_snr"): (3.713e-02, 1.817e-02, 8.988e-03, 4.471e-03),
    ("dpm_solver", "log_snr"): (8.840e-03, 2.930e-03, 8.750e-04, 2.133e-04),
    ("heun", "log_snr"): (1.033e-02, 2.382e-03, 5.254e-04, 1.244e-04),
    ("ddim", "karras"): (4.729e-02, 2.313e-02, 1.145e-02, 5.707e-03),
    ("dpm_solver", "karras"): (2.215e-02, 4.882e-03, 1.539e-03, 3.793e-04),
    ("heun", "karras"): (1.559e-02, 3.440e-03, 7.752e-04, 1.826e-04),
}


def settings(schedule="linear", prediction="eps"):
    return types.SimpleNamespace(
        framework="ddpm", schedule=schedule, num_timesteps=1000, prediction=prediction
    )


def ddpm(schedule="linear", prediction="eps"):
    return make_process(settings(schedule, prediction), (32, 32))


def edm(data_std=0.5):
    settings = types.SimpleNamespace(
        framework="edm", sigma_data=data_std, edm_mean=-1.2, edm_std=1.2,
        sigma_min=0.002, sigma_max=80.0, rho=7.0,
    )  # fmt: skip
    return make_process(settings, (32, 32))


def framework(name):
    """(process, real-valued time -> its level, of the process's own prediction)."""
    if name == "edm":
        return edm(), lambda time: edm().at(jnp.exp(time / 100))
    schedule, prediction = ("cosine", "v") if name == "cosine" else ("linear", name)
    abar = ddpm_lib.make_alphas_cumprod(settings(schedule), (32, 32))
    log_snr = np.log(abar / (1 - abar)) / 2

    def level_at(time):
        here = jnp.interp(time, np.arange(1000.0), log_snr)
        signal, noise = (1 + jnp.exp(-2 * here)) ** -0.5, (1 + jnp.exp(2 * here)) ** -0.5
        p, q = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-noise, signal)}[prediction]
        return process.Level(signal, noise, p, q, 1.0, time)

    return ddpm(schedule, prediction), level_at


def best_output(level_at):
    """(scaled x_t [B], time_B) -> output of the best network for the mixture."""

    def predict(x_in, time_B):
        level = level_at(time_B[0])
        x_t = x_in / level.scale
        var = level.signal**2 * STD**2 + level.noise**2
        off = x_t[:, None] - level.signal * MEAN
        share = jax.nn.softmax(jnp.log(WEIGHT / jnp.sqrt(var)) - off**2 / (2 * var), axis=1)
        x0 = jnp.sum(share * (MEAN + level.signal * STD**2 / var * off), axis=1)
        eps = (x_t - level.signal * x0) / level.noise
        return level.p * x0 + level.q * eps

    return predict


def drawn(name, x_T, steps, spacing, **how):
    made, level_at = framework(name)
    levels = made.ladder(steps, spacing)
    how = {"clip": lambda x0: x0} | how

    def draw_noise(i):
        key = jax.random.fold_in(jax.random.key(1), i)
        return jax.random.normal(key, x_T.shape, x_T.dtype)

    predict = best_output(level_at)
    draw = jax.jit(lambda: samplers.walk(predict, x_T, draw_noise, levels, **how))
    return np.asarray(draw())


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


def official_ddim(predict, prediction, noises, steps):
    """DDIM at eta 1 as the official sampler has it: for x0 and v, eps follows the clipped x0."""
    abar = np.cumprod(1 - ddpm_lib.make_betas("cosine", 1000, (32, 32)))
    walk = ddpm_lib.timesteps(1000, steps)
    x = noises[0]
    for i, (t, s) in enumerate(zip(walk, walk[1:], strict=False)):
        signal, noise = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        output = np.asarray(predict(x, np.full(len(x), t)), np.float64)
        if prediction == "eps":
            eps = output
            x0 = np.clip((x - noise * eps) / signal, -1, 1)
        else:
            x0 = np.clip(output if prediction == "x0" else signal * x - noise * output, -1, 1)
            eps = (x - signal * x0) / noise
        if s < 0:
            return x0
        sigma = np.sqrt((1 - abar[t] / abar[s]) * (1 - abar[s]) / (1 - abar[t]))
        x = np.sqrt(abar[s]) * x0 + np.sqrt(1 - abar[s] - sigma**2) * eps + sigma * noises[i + 1]


@pytest.mark.parametrize("prediction, recomputes", [("eps", False), ("x0", True), ("v", True)])
def test_the_official_rule_for_eps_is_a_setting(official_model, prediction, recomputes):
    model, params = official_model
    noises = np.random.default_rng(0).normal(size=(11, 2, 64, 48))
    noises = jnp.asarray(noises, jnp.float32)
    predict = jax.jit(lambda x_t, t_B: uvit.apply(model, params, x_t, t_B))
    expected = official_ddim(predict, prediction, np.asarray(noises, np.float64), 10)

    def ours(recompute_eps):
        levels = ddpm("cosine", prediction).ladder(10, "timestep")
        how = dict(recompute_eps=recompute_eps)
        walk = lambda: samplers.walk(predict, noises[0], lambda i: noises[i + 1], levels, **how)  # noqa: E731
        return np.asarray(jax.jit(walk)())

    # The first step nearly cancels in float32, as in the official code; here it is in float64.
    assert_close(ours(recomputes), expected, 3e-4)
    assert np.abs(ours(not recomputes) - expected).max() > 3e-3


@pytest.mark.parametrize("how", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(
    "name, spacing",
    [*((name, "log_snr") for name in FRAMEWORKS), ("eps", "timestep"), ("eps", "karras")],
)
def test_every_sampler_draws_the_mixture(name, spacing, how):
    x_T = jax.random.normal(jax.random.key(0), (5_000,))
    steps = 150 if how["sampler"] in ("dpm_solver", "heun") else 1000  # of second or first order
    images = drawn(name, x_T, steps, spacing, **how)
    mean, var = WEIGHT @ MEAN, WEIGHT @ (MEAN**2 + STD**2)
    assert abs(images.mean() - mean) < 0.015
    assert_close(images.std(), np.sqrt(var - mean**2), 0.02)
    for weight, center, std in zip(WEIGHT, MEAN, STD, strict=True):  # each mode for itself
        mode = images[(images < 0) == (center < 0)]
        assert abs(len(mode) / len(images) - weight) < 0.015
        assert_close(mode.std(), std, 0.05)


@pytest.mark.parametrize("sampler, spacing", ERRORS, ids="-".join)
def test_the_error_falls_with_the_order_of_the_sampler(sampler, spacing):
    with jax.enable_x64(True):
        x_T = jnp.asarray(np.random.default_rng(0).normal(size=2000))
        how = dict(sampler=sampler, eta=0.0, recompute_eps=True)
        fine = drawn("v", x_T, 2000, spacing, sampler="heun")
        assert fine.dtype == np.float64
        found = [np.sqrt(np.mean((drawn("v", x_T, n, spacing, **how) - fine) ** 2)) for n in STEPS]
    order = np.log2(found[-2] / found[-1])
    assert order == pytest.approx(1 if sampler == "ddim" else 2, abs=0.12), found
    np.testing.assert_allclose(found, ERRORS[sampler, spacing], rtol=0.02)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "heun"])
def test_the_order_is_that_of_the_sampler_on_another_framework(sampler):
    with jax.enable_x64(True):
        x_T = jnp.asarray(np.random.default_rng(0).normal(size=500))
        how = dict(sampler=sampler, eta=0.0)
        fine, rough, double = (drawn("edm", x_T, n, "log_snr", **how) for n in (3000, 150, 300))
    order = np.log2(np.std(rough - fine) / np.std(double - fine))
    assert order == pytest.approx(1 if sampler == "ddim" else 2, abs=0.15)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
def test_a_walk_has_exactly_its_levels_between_the_ends_of_the_schedule(schedule, spacing):
    made = ddpm(schedule, "v")
    whole = made.ladder(1000, "timestep")
    log_snr = np.log(whole.signal / whole.noise)
    for steps in (1, 2, 7, 1000):
        levels = made.ladder(steps, spacing)
        assert len(levels.time) == steps == len(np.unique(levels.time))
        here = np.log(levels.signal / levels.noise)
        # The cosine's last timesteps, whose signal is less still, are left out.
        assert_close(here[0], max(log_snr[0], -5.1), 1e-9)
        assert (abs(levels.time[0] - 999) < 1e-6) == (schedule == "linear")
        assert_close(here, np.interp(levels.time, np.arange(1000), log_snr[::-1]), 1e-9)
        assert_close(levels.signal**2 + levels.noise**2, 1.0, 1e-12)
        if steps > 1:
            assert abs(levels.time[-1]) < 1e-9
            even = here if spacing == "log_snr" else np.exp(-here / 7)
            gaps = np.diff(even)
            assert_close(gaps, np.full_like(gaps, gaps.mean()), 1e-6)


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("how", SAMPLERS.values(), ids=SAMPLERS)
def test_the_true_noise_leads_back_to_x0(name, how):
    made, level_at = framework(name)
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (12,)), jnp.float32)

    def predict(x_in, time_B):
        level = level_at(time_B[0])
        eps = (x_in / level.scale - level.signal * x0) / level.noise
        return level.p * x0 + level.q * eps

    x_T = jax.random.normal(jax.random.key(0), x0.shape)
    images = samplers.walk(predict, x_T, lambda i: x_T, made.ladder(25, "timestep"), **how)
    assert_close(images, x0, 1e-3)


@pytest.mark.parametrize("threshold", [0.0, 0.9])
@pytest.mark.parametrize("how", SAMPLERS.values(), ids=SAMPLERS)
def test_samples_stay_in_range_when_the_network_is_wrong(how, threshold):
    x_T = jax.random.normal(jax.random.key(0), (4, 5))
    levels = ddpm("cosine").ladder(5, "timestep")
    clip = samplers.dynamic_clip(threshold) if threshold else samplers.static_clip
    images = samplers.walk(lambda x, t: 50 * x, x_T, lambda i: x_T, levels, clip=clip, **how)
    assert np.abs(images).max() <= 1


def test_dynamic_thresholding_divides_by_a_quantile_of_each_image():
    x0 = jnp.array([[0.5, -1.0, 2.0, -4.0, 8.0], [0.1, 0.2, -0.3, 0.4, 0.5]])
    found = samplers.dynamic_clip(0.75)(x0)
    assert_close(found, np.array([[0.125, -0.25, 0.5, -1, 1], x0[1]]), 1e-6)
    as_patches = samplers.dynamic_clip(0.75)(x0.reshape(2, 5, 1))
    np.testing.assert_array_equal(as_patches.reshape(2, 5), found)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver", "heun"])
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
    assert len(samplers.visited(levels, sampler).signal) == len(calls)


@pytest.mark.parametrize("name", ["v", "edm"])
@pytest.mark.parametrize("how", SAMPLERS.values(), ids=SAMPLERS)
def test_known_values_stay_and_follow_the_forward_process(name, how):
    made, level_at = framework(name)
    count = 20_000
    x_T = jax.random.normal(jax.random.key(0), (count, 2))
    image = jnp.full((count, 2), 0.7)
    known = jnp.array([[True, False]])
    levels = made.ladder(100, "log_snr")
    best = best_output(level_at)
    seen = []

    def predict(x_in, time_B):
        scale = level_at(time_B[0]).scale
        std = jnp.std(x_in[:, 0] / scale)
        jax.debug.callback(lambda *pair: seen.append(pair), time_B[0], std)
        return jnp.stack([best(column, time_B) for column in x_in.T], axis=1)

    def draw_noise(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x_T.shape)

    images = jax.jit(
        lambda: samplers.walk(predict, x_T, draw_noise, levels, image=image, known=known, **how)
    )()
    jax.effects_barrier()
    np.testing.assert_array_equal(images[:, 0], image[:, 0])
    assert abs(images[:, 1].mean() - WEIGHT @ MEAN) < 0.02  # drawn as if nothing were known
    assert len(seen) == samplers.evaluations(how["sampler"], 100)
    noise = {float(np.float32(t)): n for t, n in zip(levels.time, levels.noise, strict=True)}
    for time, std in seen:
        assert_close(std, noise[float(time)], 0.02)


@pytest.mark.parametrize("how", SAMPLERS.values(), ids=SAMPLERS)
def test_a_walk_from_an_image_stays_near_it_the_fewer_of_the_steps_it_takes(how):
    count = 5000
    x_T = jax.random.normal(jax.random.key(0), (count,))
    image = jnp.full((count,), 0.4)  # the mode at the right
    made, level_at = framework("v")
    whole = made.ladder(100, "log_snr")
    kept = []
    for last in (20, 50, 100):
        levels = jax.tree.map(lambda x, last=last: x if isinstance(x, float) else x[-last:], whole)
        predict = best_output(level_at)
        walk = lambda levels=levels, predict=predict: samplers.walk(  # noqa: E731
            predict, x_T, lambda i: jnp.roll(x_T, i + 1), levels, image=image, **how
        )
        kept.append(np.mean(np.asarray(jax.jit(walk)()) > 0))
    assert kept[0] == 1 and kept[0] > kept[1] > kept[2]
    assert_close(kept[2], 0.6, 0.05)


def test_guidance_extrapolates_from_the_unconditional_output():
    def predict_label(x_t, t_B, label_B):
        return jnp.where(label_B == 10, 1.0, 3.0)[:, None] * x_t

    x = jnp.ones((2, 4))
    t = jnp.zeros((2,), jnp.int32)
    guided = samplers.guided(predict_label, jnp.asarray([4, 7]), 10, 2.5)
    np.testing.assert_allclose(guided(x, t), 1 + 2.5 * (3 - 1))
    plain = samplers.guided(predict_label, jnp.asarray([4, 7]), 10, 1.0)
    np.testing.assert_allclose(plain(x, t), 3)


def test_guidance_between_two_times_costs_one_evaluation_elsewhere():
    batches = []

    def predict_label(x_t, t_B, label_B):
        jax.debug.callback(lambda t: batches.append((float(t[0]), len(x_t))), t_B)
        return jnp.where(label_B == 10, 1.0, 3.0)[:, None] * x_t

    x = jnp.ones((2, 4))
    guided = jax.jit(samplers.guided(predict_label, jnp.asarray([4, 7]), 10, 2.5, (200.0, 600.5)))
    for time, factor in ((100.0, 3), (200.0, 6), (600.5, 6), (601.0, 3)):
        np.testing.assert_allclose(guided(x, jnp.full((2,), time)), factor)
    jax.effects_barrier()
    assert batches == [(100.0, 2), (200.0, 4), (600.5, 4), (601.0, 2)]
