import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskdm_jax import optim
from maskdm_jax.config import default_config


def test_ema_ramp_copies_for_100_updates_and_then_follows_the_official_rule():
    decays = [float(optim.ema_decay(jnp.int32(step), 0.999, True)) for step in (0, 99, 100, 150)]
    np.testing.assert_allclose(decays, [0, 0, 0, 1 - 51 ** (-2 / 3)], rtol=1e-6)
    assert float(optim.ema_decay(jnp.int32(10**7), 0.999, True)) == pytest.approx(0.999)
    assert float(optim.ema_decay(jnp.int32(0), 0.9, False)) == pytest.approx(0.9)


def test_ema_is_the_weighted_mean_of_old_and_new():
    config = default_config()
    config.optim.ema_ramp = False
    config.optim.ema_decay = 0.75
    ema = optim.update_ema({"a": jnp.float32(1)}, {"a": jnp.float32(5)}, jnp.int32(0), config)
    assert float(ema["a"]) == pytest.approx(2.0)


def test_learning_rate_warms_up_and_decays():
    config = default_config()
    config.optim.lr_peak = 1.0
    config.optim.warmup_steps = 10
    constant = optim.learning_rate(config, 110)
    assert [float(constant(s)) for s in (0, 5, 10, 110)] == pytest.approx([0, 0.5, 1, 1])
    config.optim.lr_schedule = "cosine"
    cosine = optim.learning_rate(config, 110)
    assert [float(cosine(s)) for s in (5, 10, 60, 110)] == pytest.approx([0.5, 1, 0.5, 0], abs=1e-6)
    config.optim.warmup_steps = 0
    assert float(optim.learning_rate(config, 110)(0)) == pytest.approx(1)


def test_clipping_bounds_the_gradient_and_decay_reaches_every_parameter():
    config = default_config()
    config.optim.clip_norm = 1.0
    config.optim.lr_peak = 0.1
    config.optim.weight_decay = 0.5
    optimizer = optim.make_optimizer(config, 10)
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)}
    zero = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros((2,))}
    updates, state = optimizer.update(zero, optimizer.init(params), params)
    for leaf in updates.values():
        np.testing.assert_allclose(leaf, -0.1 * 0.5 * 2.0, rtol=1e-6)
    large = {"kernel": jnp.full((2, 2), 30.0), "bias": jnp.full((2,), 40.0)}
    _, state = optimizer.update(large, optimizer.init(params), params)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.tree.norm(first_moment)) == pytest.approx(1 - config.optim.b1, rel=1e-3)


def test_the_global_norm_is_that_of_all_leaves_together():
    generator = np.random.default_rng(0)
    shapes = {"scalar": (), "bias": (5,), "kernel": (3, 4), "stack": (2, 3, 4)}
    tree = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    assert float(optim.global_norm(tree)) == pytest.approx(float(optax.tree.norm(tree)), rel=1e-6)
    tree["bias"][0] = np.nan
    assert np.isnan(optim.global_norm(tree))
