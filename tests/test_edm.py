"""EDM: the paper's coefficients, a walk whose end is known, training, and what is refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from test_pooling import pooled_config
from test_step import curve

import maskdm_jax
from configs import edm_digits, finetune_digits, pretrain_digits
from maskdm_jax import checkpoint, config_file, heldout, sharding, state, train
from maskdm_jax import config as config_lib
from maskdm_jax.diffusion import make_process, objective, process, samplers
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import uvit
from maskdm_jax.report import commands
from maskdm_jax.weights import start, torch_io

SIGMAS = np.exp(np.linspace(np.log(0.002), np.log(80), 9))


def settings(**fields):
    given = dict(sigma_data=0.5, edm_mean=-1.2, edm_std=1.2, sigma_min=0.002, sigma_max=80.0, rho=7)
    return types.SimpleNamespace(framework="edm", **given | fields)


def edm(**fields):
    return make_process(settings(**fields), (8, 8))


def best_output(level_at, mean, std):
    """(scaled x_t, time) -> output of the best network for data N(mean, std^2)."""

    def predict(x_in, time_B):
        level = level_at(time_B)
        x_t = x_in / level.scale
        signal, noise = level.signal, level.noise
        eps = noise * (x_t - signal * mean) / (signal**2 * std**2 + noise**2)
        return level.p * (x_t - noise * eps) / signal + level.q * eps

    return predict


# ------------------------------------------------------------------------------ the paper's numbers
@pytest.mark.parametrize("data_std", [0.5, 0.75])
def test_the_coefficients_are_those_of_the_papers_table(data_std):
    for level, tolerance in (
        (edm(sigma_data=data_std).at(SIGMAS), 1e-12),
        (edm(sigma_data=data_std).at(jnp.asarray(SIGMAS, jnp.float32)), 1e-5),
    ):
        inverse = process.invert(level)
        total = SIGMAS**2 + data_std**2
        expected = {
            "c_skip": (inverse.x0[0], data_std**2 / total),
            "c_out": (inverse.x0[1], SIGMAS * data_std / np.sqrt(total)),
            "c_in": (level.scale, 1 / np.sqrt(total)),
            "c_noise": (level.time / 400, np.log(SIGMAS) / 4),
        }
        for name, (ours, theirs) in expected.items():
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, err_msg=name)
        np.testing.assert_array_equal(level.signal, 1)


def test_the_plain_loss_is_the_papers_weighted_loss_of_the_denoiser():
    made, data_std = edm(sigma_data=0.6), 0.6
    x0, eps, output = np.random.default_rng(0).normal(size=(3, len(SIGMAS), 4, 3))
    loss_B = objective.denoising_loss(lambda x, t: output, made, x0, eps, SIGMAS)
    sigma = SIGMAS[:, None, None]
    noisy, total = x0 + sigma * eps, sigma**2 + data_std**2
    denoised = data_std**2 / total * noisy + sigma * data_std / np.sqrt(total) * output
    weight = total / (sigma * data_std) ** 2
    expected = (weight * (denoised - x0) ** 2).mean((1, 2))
    np.testing.assert_allclose(loss_B, expected, rtol=1e-4)


def test_input_and_target_have_unit_variance_for_data_of_sigma_data():
    x0, eps = np.random.default_rng(0).normal(size=(2, len(SIGMAS), 20_000))
    x0, level = 0.5 * x0, edm().at(SIGMAS)
    seen = process.network_input(level, process.noised(level, x0, eps))
    for values in (seen, process.target(level, x0, eps)):
        np.testing.assert_allclose(values.std(1), 1, rtol=0.03)


def test_training_draws_log_normal_sigmas():
    n = 20_000
    sigma = edm(edm_mean=-0.4, edm_std=0.9).draw(jax.random.key(0), n)
    drawn = np.log(np.float64(sigma))
    assert sigma.dtype == np.float32 and abs(drawn.mean() + 0.4) < 5 * 0.9 / n**0.5
    for z, share in ((-1.0, 0.158655), (1.0, 0.841345), (1.5, 0.933193)):
        assert abs(np.mean(drawn < 0.9 * z - 0.4) - share) < 5 * (share * (1 - share) / n) ** 0.5


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_the_walk_has_the_papers_steps_and_the_even_one_the_same_ends(steps):
    levels = edm(sigma_max=70.0, rho=5.0).ladder(steps, "timestep")
    i = np.arange(steps) / max(steps - 1, 1)
    expected = (70 ** (1 / 5) + i * (0.002 ** (1 / 5) - 70 ** (1 / 5))) ** 5
    np.testing.assert_allclose(levels.noise, expected, rtol=1e-12)
    even = edm(sigma_max=70.0).ladder(steps, "log_snr").noise
    np.testing.assert_allclose(even[[0, -1]], expected[[0, -1]], rtol=1e-12)
    np.testing.assert_allclose(np.diff(np.log(even), 2), 0, atol=1e-9)


@pytest.mark.parametrize("spacing", ["timestep", "log_snr"])
def test_ddim_approaches_the_exact_flow_of_gaussian_data_at_first_order(spacing):
    mean, std = 0.3, 0.1
    made = edm(sigma_max=10.0, sigma_min=0.01)
    predict = best_output(lambda time: made.at(jnp.exp(time / 100)), mean, std)
    unit = jnp.linspace(-2, 2, 41)
    first = made.ladder(1, spacing).noise[0]
    # dx / dsigma = sigma (x - mean) / (std^2 + sigma^2) keeps (x - mean) / sqrt(std^2 + sigma^2).
    exact = mean + (unit * np.hypot(1, first) - mean) * std / np.hypot(std, first)
    errors = []
    for steps in (20, 40, 80, 160):
        levels = made.ladder(steps, spacing)
        found = jax.jit(lambda levels=levels: samplers.walk(predict, unit, None, levels, eta=0.0))()
        errors.append(float(np.abs(found - exact).max()))
    assert errors[-1] < 0.05 * std
    for one, halved in zip(errors, errors[1:], strict=False):
        assert 1.6 < one / halved < 2.5


# ---------------------------------------------------------------------------------------- training
def edm_config(config, **fields):
    config.diffusion.update(framework="edm", sigma_data=0.75)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    config_lib.validate(config)
    return config


@pytest.mark.parametrize("kind", ["whole", "patch", "pooled", "weighted"])
def test_every_kind_of_stage_trains_alike_on_8_devices(tiny_config, kind):
    config = edm_config(tiny_config)
    config.optim.update(warmup_steps=0, lr_peak=3e-3)
    config.model.depth = 1
    if kind == "whole":
        config.mask.kind = "none"
    elif kind == "pooled":
        pooled_config(config)
    elif kind == "weighted":
        config.diffusion.update(loss_weight="min_snr", input_perturbation=0.1)
    losses, _ = curve(config, 1, steps=12)
    split, _ = curve(config, 8, steps=12)
    assert_close(split, losses, 1e-5)
    if kind != "weighted":  # the target has unit variance, and the first output is nearly 0
        assert abs(losses[0] - 1) < 0.5 and losses[-4:].mean() < losses[:2].mean()


def test_a_stopped_run_resumes_like_an_undisturbed_one_and_is_drawn(tiny_config, tmp_path):
    config = edm_config(tiny_config, mask__kind="none", model__depth=1)
    config.checkpoint.every_steps = 2
    config.train.update(num_steps=4, sample_every_steps=4)
    config.sample.update(preview_num=8, preview_steps=2, sampler="ddim", eta=0.0)
    train.train(config, tmp_path / "calm")
    config.train.num_steps = 2
    train.train(config, tmp_path / "stopped")
    config.train.num_steps = 4
    train.train(config, tmp_path / "stopped")
    digests = [checkpoint.digest(tmp_path / name) for name in ("calm", "stopped")]
    assert digests[0] == digests[1]

    model = maskdm_jax.load(tmp_path / "calm")
    image = model.sample(3, steps=1500)  # no number of timesteps limits them
    assert image.shape == (3, 8, 8, 1) and image.std() > 0
    assert model.num_timesteps is None


def test_predictions_are_those_of_the_training_loss(tiny_config, tmp_path):
    config = edm_config(tiny_config, train__num_steps=1, model__dtype="float32")
    train.train(config, tmp_path)
    model = maskdm_jax.load(tmp_path, weights="raw")
    x0 = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    eps = np.random.default_rng(1).normal(size=x0.shape).astype(np.float32)
    sigma = np.array([0.2, 5.0])
    x_t = model.add_noise(x0, eps, sigma)
    assert_close(x_t, x0 + sigma[:, None, None, None] * eps, 1e-6)
    found_x0, found_eps = model.predict(x_t, sigma, label=3)
    assert_close(found_x0 + sigma[:, None, None, None] * found_eps, x_t, 1e-5)
    whole = model.predict(x_t[1:], 5, label=3)[0]  # one number stands for all
    assert_close(found_x0[1:], whole, 1e-5)
    # The error of x0 is c_out times that of the output.
    made, network = make_process(config.diffusion, (8, 8)), uvit.make_model(config)
    tokens = [x.reshape(2, 4, 2, 4, 2).swapaxes(2, 3).reshape(2, 16, 4) for x in (x0, eps)]

    def predict(x_BNP, time_B):
        label_B = jnp.full(2, 3, jnp.int32)
        return uvit.apply(network, model.params, x_BNP, time_B, label_B=label_B)

    loss_B = objective.denoising_loss(predict, made, *tokens, jnp.asarray(sigma, jnp.float32))
    of_x0 = np.square(found_x0 - x0).mean((1, 2, 3))
    c_out = sigma * 0.75 / np.hypot(sigma, 0.75)
    np.testing.assert_allclose(of_x0 / c_out**2, loss_B, rtol=1e-4)
    for wrong, said in ((0.0, "holds 0.0"), (-1, "holds -1"), (np.nan, "holds nan"),
                        ("3", "of shape"), ([1.0] * 3, "of shape")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{said}.*type t=1.0$"):
            model.predict(x_t, wrong)


# ---------------------------------------------------------------------------------- held-out loss
def test_every_bin_of_the_heldout_loss_has_its_sigmas():
    made = edm()
    has_levels, draw_level = heldout._sigmas_of_bins(made)
    assert np.asarray(has_levels).all()
    spread = jnp.asarray([0, 2**15, 2**16 - 1])
    for k, (low, high) in enumerate(zip(heldout.EDGES, heldout.EDGES[1:], strict=False)):
        log_snr = -2 * np.log(np.asarray(draw_level(k, spread)))
        low = -2 * np.log(80) if k == 0 else low
        high = -2 * np.log(0.002) if k == 9 else high
        middle = (low + high) / 2
        np.testing.assert_allclose(log_snr, [low, middle, high], atol=1e-3)
    has_levels, _ = heldout._sigmas_of_bins(edm(sigma_max=10.0))
    assert not np.asarray(has_levels)[:2].any() and np.asarray(has_levels)[2:].all()


def test_the_heldout_loss_of_a_network_that_sees_no_noise_is_one(tiny_config, monkeypatch):
    config = edm_config(tiny_config)

    def no_noise_seen(model, params, x_BNP, time_B, label_B=None):
        """The output of a network for which x_t is x0: p x_t."""
        level = make_process(config.diffusion, (8, 8)).at(jnp.exp(time_B / 100))
        return x_BNP * (level.p / level.scale)[:, None, None]

    monkeypatch.setattr(uvit, "apply", no_noise_seen)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    params = state.fresh_params(config, mesh)
    image = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    index = np.arange(64, dtype=np.int32)
    loss = heldout.jit_heldout_loss(config, mesh)(params, image, index % 10, index)
    np.testing.assert_allclose(np.mean(loss, axis=0), 1, rtol=0.1)


# ---------------------------------------------------------------------------------------- refusals
def test_weights_of_another_framework_or_scale_are_refused(trained, tiny_config, tmp_path):
    config = edm_config(tiny_config, train__num_steps=1)
    config.init.path = str(trained)
    with pytest.raises(ConfigError, match=r"diffusion.framework \(ddpm there, edm here\)") as error:
        train.train(config, tmp_path / "w")
    assert "--config.diffusion.framework=ddpm to keep their meaning" in str(error.value)
    with pytest.raises(ConfigError, match="a different noise process: diffusion.framework"):
        train.train(edm_config(tiny_config, init__path=""), trained)
    other = config.copy_and_resolve_references()
    other.diffusion.sigma_data = 0.5
    assert config_lib.differences(config, other, [config_lib.MEANING]) == ["diffusion.sigma_data"]


def test_an_official_file_holds_weights_of_ddpm_on_pixels(tiny_config, tmp_path, monkeypatch):
    config, path = edm_config(tiny_config, model__wavelet="haar"), tmp_path / "official.pt"
    path.touch()
    model = uvit.make_model(config)
    params = jax.device_get(uvit.init_params(model, jax.random.key(0)))
    official = torch_io.Official(params, None, 2, 1)
    monkeypatch.setattr(torch_io, "load_official", lambda *args: official)
    config.init.path = str(path)
    with pytest.raises(ConfigError, match="framework .ddpm there") as error:
        start.load_params(config, lambda: params)
    assert "model.wavelet (none there, haar here)" in str(error.value)


def test_fields_of_the_other_framework_are_neither_compared_nor_typed():
    one, other = (edm_config(pretrain_digits.get_config()) for _ in range(2))
    other.diffusion.update(schedule="linear", prediction="v", draw="logit_normal")
    assert config_lib.differences(one, other) == []
    assert config_lib.as_flags(other, ["diffusion.prediction"]) == ""
    file = "configs/pretrain_digits.py"
    for typed, framework in (("schedule=linear", "ddpm"), ("prediction=v", "ddpm")):
        with pytest.raises(ConfigError, match=f"type --config.diffusion.framework={framework}"):
            config_file.load(file, ["diffusion.framework=edm", f"diffusion.{typed}"])
    with pytest.raises(ConfigError, match="type --config.diffusion.framework=edm, or leave out"):
        config_file.load(file, ["diffusion.rho=5"])
    assert config_file.load(file, ["diffusion.rho=5", "diffusion.framework=edm"]).diffusion.rho == 5
    phased = "phases=((1, {'diffusion.draw': 'logit_normal'}), (1, {'diffusion.edm_mean': 0}))"
    with pytest.raises(ConfigError, match="sets diffusion.draw, which diffusion.framework=edm"):
        config_file.load(file, ["diffusion.framework=edm", phased])


def test_the_pages_command_has_the_fields_of_the_runs_framework_alone():
    run = edm_config(finetune_digits.get_config(), diffusion__edm_mean=-0.4)
    configs = {"configs/finetune_digits.py": finetune_digits.get_config()}
    typed = commands.command(run, "W", configs)
    assert "--config.diffusion.edm_mean=-0.4" in typed and "sigma_data=0.75" in typed
    configs = {"configs/edm_digits.py": edm_digits.get_config("edm")}
    typed = commands.command(edm_digits.get_config("ddpm_v"), "W", configs)
    assert "--config.diffusion.prediction=v" in typed and "sigma" not in typed
    assert all(line.strip(" \\") for line in typed.splitlines())


def test_sigma_max_is_above_sigma_min(tiny_config):
    for low, high, good in ((0.5, 0.1, 80.0), (100.0, 80.0, 200.0)):
        said = f"sigma_max is {high}; expected above .* type --config.diffusion.sigma_max={good}$"
        with pytest.raises(ConfigError, match=said):
            edm_config(tiny_config, diffusion__sigma_min=low, diffusion__sigma_max=high)
