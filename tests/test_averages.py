import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax import averages, checkpoint, draw, optim, sample, sharding, train
from maskdm_jax.config import default_config
from maskdm_jax.errors import ConfigError


def power_config():
    config = default_config()
    config.optim.ema = "power"
    return config


def walk(num_steps, seed=0):
    """Parameters that drift and shake, [num_steps, 5]."""
    generator = np.random.default_rng(seed)
    t = np.arange(1, num_steps + 1)[:, None] / num_steps
    return np.sin(3 * t + np.arange(5)) + 0.3 * generator.normal(size=(num_steps, 5))


def averaged(path_TP, std):
    """The power-function average by its definition: weights proportional to t^gamma."""
    t = np.arange(1, len(path_TP) + 1, dtype=np.float64)
    # The sum over steps of what the recursion gives step t: t^(gamma + 1) - (t - 1)^(gamma + 1).
    power = optim.power_gamma(std) + 1
    weight_T = (t**power - (t - 1) ** power) / len(path_TP) ** power
    return weight_T @ path_TP


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.25])
def test_the_exponent_gives_a_profile_of_that_standard_deviation(std):
    t = (np.arange(200_000) + 0.5) / 200_000
    weight = t ** optim.power_gamma(std)
    weight /= weight.sum()
    mean = weight @ t
    assert np.sqrt(weight @ (t - mean) ** 2) == pytest.approx(std, rel=1e-3)


def test_both_averages_follow_their_definition():
    config, path = power_config(), walk(400)
    ema = optim.init_ema({"a": jnp.zeros(5)}, config)
    update = jax.jit(lambda e, p, n: optim.update_ema(e, p, n, config))
    for step, params in enumerate(path):
        ema = update(ema, {"a": jnp.asarray(params, jnp.float32)}, jnp.int32(step))
    for name, std in optim.POWER_STDS.items():
        np.testing.assert_allclose(ema[name]["a"], averaged(path, std), atol=2e-4)


@pytest.mark.parametrize("begun", [0, 700])
@pytest.mark.parametrize("std", [0.03, 0.05, 0.08, 0.15, 0.2])
def test_an_average_of_another_length_is_made_from_the_snapshots_of_its_phase(std, begun):
    path, taken = walk(2000), range(125, 2001, 125)
    stored = [(None, begun + step, None) for step in taken]

    def load(_, step, item):
        return {k: {"a": averaged(path[: step - begun], s)} for k, s in optim.POWER_STDS.items()}

    made = averages._combined(stored, load, begun + 2000, std, begun)["a"]
    truth = averaged(path, std)
    scale = np.abs(averaged(path, 0.05) - averaged(path, 0.1)).max()
    assert np.abs(made - truth).max() < 0.05 * scale


def test_a_run_keeps_snapshots_and_samples_with_any_length(tiny_config, tmp_path, capsys):
    config = tiny_config
    config.model.depth = 1
    config.optim.update(ema="power", ema_snapshot_steps=2)
    config.train.num_steps, config.checkpoint.every_steps = 9, 4
    config.sample.num = 4
    train.train(config, tmp_path)
    assert "snapshots of the averages will take 0.00 GiB by step 9" in capsys.readouterr().out
    assert checkpoint.steps(averages.folder(tmp_path)) == [2, 4, 6, 8]
    assert checkpoint.steps(tmp_path) == [8, 9]

    mesh = sharding.make_mesh(config)
    abstract = draw.abstract_params(config, mesh)
    short = averages.restore(config, tmp_path, 9, abstract)
    again = averages.restore(config, tmp_path, 9, abstract, std=0.05)
    longer = averages.restore(config, tmp_path, 9, abstract, std=0.08)
    kernel = lambda tree: np.asarray(tree["mid_block"]["qkv"]["kernel"])  # noqa: E731
    np.testing.assert_allclose(kernel(again), kernel(short), rtol=1e-3, atol=1e-6)
    assert np.abs(kernel(longer) - kernel(short)).max() > 1e-5
    config.sample.ema_std = 0.08
    assert "_std0.08" in sample.write_samples(config, tmp_path).name

    # A run that resumes from step 8 removes later and unfinished snapshots, and makes them again.
    shutil.rmtree(tmp_path / "checkpoints" / "9")
    place = averages.folder(tmp_path) / "checkpoints"
    (place / "8" / "sha256.json").unlink()
    shutil.copytree(place / "6", place / "10")
    config.train.num_steps = 12
    train.train(config, tmp_path)
    told = capsys.readouterr().out
    assert f"averages {place / '8'}: sha256.json is missing in it" in told
    assert f"averages {place / '10'}: it is beyond step 8, from which the run resumes" in told
    assert checkpoint.steps(averages.folder(tmp_path)) == [2, 4, 6, 10, 12]


def test_lengths_that_a_run_cannot_give_are_refused(tiny_config, trained):
    tiny_config.sample.ema_std = 0.1
    with pytest.raises(ConfigError, match="type --config.sample.ema_std=0"):
        sample.write_samples(tiny_config, trained)
    tiny_config.optim.ema = "power"
    with pytest.raises(ConfigError, match="optim.ema .decay there, power here"):
        sample.write_samples(tiny_config, trained)


def test_a_length_that_the_snapshots_cannot_give_is_refused():
    stored = [(None, step, None) for step in (500, 1000)]
    with pytest.raises(ConfigError, match="sample.ema_std is 0.25, .* with an error of"):
        averages._combined(stored, None, 1000, 0.25)


@pytest.mark.parametrize("n", [1, 1_000, 500_000, 3_000_000])
def test_the_rate_of_an_average_has_its_digits_however_long_the_run(n):
    config = power_config()
    zero, one = ({"a": jnp.full(1, x, jnp.float32)} for x in (0, 1))
    updated = optim.update_ema({k: zero for k in optim.POWER_STDS}, one, jnp.int32(n - 1), config)
    for name, std in optim.POWER_STDS.items():
        rate = 1 - (1 - 1 / n) ** (optim.power_gamma(std) + 1)
        np.testing.assert_allclose(updated[name]["a"], rate, rtol=1e-6)
