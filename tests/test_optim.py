import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskdm_jax import optim
from maskdm_jax.config import default_config
from maskdm_jax.model import uvit


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


def rates(steps, num_steps=110, **fields):
    """Learning rates after so many updates, with a peak of 1 and a warm-up of 10."""
    config = default_config()
    config.optim.update({"lr_peak": 1.0, "warmup_steps": 10} | fields)
    numbers, name = optim.schedule(config, num_steps), config.optim.lr_schedule
    return np.array([float(optim.learning_rate(name, numbers, step)) for step in steps])


def test_learning_rate_warms_up_and_decays():
    assert rates((0, 5, 10, 110)) == pytest.approx([0, 0.5, 1, 1])
    falling = rates((5, 10, 60, 110), lr_schedule="cosine")
    assert falling == pytest.approx([0.5, 1, 0.5, 0], abs=1e-6)
    assert rates((0,), lr_schedule="cosine", warmup_steps=0) == pytest.approx([1])


def test_a_linear_schedule_falls_evenly_to_its_end():
    expected = [0, 0.5, 1, 0.6, 0.2, 0.2]
    falling = rates((0, 5, 10, 60, 110, 200), lr_schedule="linear", lr_end=0.2)
    np.testing.assert_allclose(falling, expected, rtol=1e-6)


def test_a_cosine_schedule_ends_at_its_share_of_the_peak():
    falling = rates((10, 60, 110, 200), lr_schedule="cosine", lr_end=0.2, lr_peak=3.0)
    np.testing.assert_allclose(falling, [3, 1.8, 0.6, 0.6], rtol=1e-6)


def test_wsd_is_constant_until_the_last_updates_and_then_falls_as_one_minus_sqrt():
    fields = dict(lr_schedule="wsd", lr_decay_share=0.25, lr_end=0.1, lr_peak=2.0)
    got = rates((5, 10, 60, 75, 76, 81, 100, 120), num_steps=100, **fields)
    progress = np.array([0, 0, 0, 0, 1 / 25, 6 / 25, 1, 1])
    expected = 2 * (0.1 + 0.9 * (1 - progress**0.5))
    expected[0] = 1
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_decay_begins_after_the_warm_up_and_a_run_of_warm_up_has_none(schedule):
    fields = dict(lr_schedule=schedule, lr_decay_share=1.0)
    np.testing.assert_allclose(rates((5, 10), num_steps=20, **fields), [0.5, 1], rtol=1e-6)
    assert rates((20,), num_steps=20, **fields) == pytest.approx([0], abs=1e-6)
    for num_steps in (3, 10):
        steps = np.arange(num_steps)
        np.testing.assert_allclose(rates(steps, num_steps, **fields), steps / 10, rtol=1e-6)


def small_params():
    """The parameters of a small network with every kind of parameter."""
    model = uvit.UViT(
        num_patches=4, patch_dim=4, width=16, depth=3, num_heads=2, num_classes=3, qkv_bias=True,
        mlp_time_embed=True,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: uvit.init_params(model, jax.random.key(0)))
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), shapes)


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def first_updates(params, grads, **fields):
    """Name -> first update over the learning rate."""
    config = default_config()
    config.optim.update({"lr_peak": 0.1, "weight_decay": 0.0} | fields)
    optimizer = optim.make_optimizer(config, optim.schedule(config, 10))
    updates, _ = optimizer.update(grads, optimizer.init(params), params, count=0)
    return {name: update / -0.1 for name, update in named(updates).items()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_on_matrices_reaches_kernels_and_nothing_else(name):
    params = small_params()
    zero = jax.tree.map(jnp.zeros_like, params)
    fields = dict(name=name, weight_decay=0.5, decay_on="matrices")
    updates = first_updates(params, zero, **fields)
    for leaf, value in named(params).items():
        decayed = leaf.endswith("kernel")
        np.testing.assert_allclose(updates[leaf], 0.5 * value * decayed, rtol=1e-5, err_msg=leaf)
    assert not updates["position"].any() and not updates["class_embed/embedding"].any()
    assert updates["patch_embed/kernel"].all()


def test_the_optimizers_state_does_not_depend_on_what_decays_or_is_clipped():
    params = small_params()
    for name in ("adamw", "muon"):
        config = default_config()
        config.optim.name = name
        before = jax.eval_shape(
            optim.make_optimizer(config, optim.schedule(config, 10)).init, params
        )
        config.optim.update(decay_on="matrices", clip_norm=1.0, lr_schedule="wsd")
        after = jax.eval_shape(
            optim.make_optimizer(config, optim.schedule(config, 20)).init, params
        )
        assert jax.tree.structure(before) == jax.tree.structure(after)
    plain = optax.chain(optax.identity(), optax.adamw(lambda count: 0.1))
    config.optim.name = "adamw"
    ours = jax.eval_shape(optim.make_optimizer(config, optim.schedule(config, 10)).init, params)
    # As it was when AdamW was the only optimizer: such checkpoints are still restored.
    assert jax.tree.structure(ours) == jax.tree.structure(jax.eval_shape(plain.init, params))


def test_muon_orthogonalises_each_matrix_of_the_blocks_and_leaves_all_else_to_adam():
    grads = small_params()
    params = jax.tree.map(jnp.zeros_like, grads)
    adam, muon = (first_updates(params, grads, name=name) for name in ("adamw", "muon"))
    matrices = {}
    for name, update in muon.items():
        block, *inner = name.split("/")
        if not block.endswith(("block", "block_0")) or inner[-1] != "kernel":
            np.testing.assert_array_equal(update, adam[name], err_msg=name)
        elif inner == ["qkv", "kernel"]:
            for part, each in zip("qkv", np.split(update, 3, axis=1), strict=True):
                matrices[f"{name}/{part}"] = each
        else:
            matrices[name] = update
    assert len(matrices) == 3 * 6 + 1  # q, k, v, proj, mlp_in, mlp_out of 3 blocks; one skip
    for name, update in matrices.items():
        size = max(update.shape)
        singular = np.linalg.svd(update, compute_uv=False) / (0.2 * size**0.5)
        assert (singular > 0.5).all() and (singular < 1.3).all(), (name, singular)
        assert 0.2 * 0.6 < np.sqrt(np.mean(update**2)) < 0.2 * 1.2, name  # about Adam's


def test_clipping_bounds_the_gradient_and_decay_reaches_every_parameter():
    config = default_config()
    config.optim.clip_norm = 1.0
    config.optim.lr_peak = 0.1
    config.optim.weight_decay = 0.5
    optimizer = optim.make_optimizer(config, optim.schedule(config, 10))
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)}
    zero = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros((2,))}
    updates, state = optimizer.update(zero, optimizer.init(params), params, count=0)
    for leaf in updates.values():
        np.testing.assert_allclose(leaf, -0.1 * 0.5 * 2.0, rtol=1e-6)
    large = {"kernel": jnp.full((2, 2), 30.0), "bias": jnp.full((2,), 40.0)}
    _, state = optimizer.update(large, optimizer.init(params), params, count=0)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.tree.norm(first_moment)) == pytest.approx(1 - config.optim.b1, rel=1e-3)


def test_the_global_norm_is_that_of_all_leaves_together():
    generator = np.random.default_rng(0)
    shapes = {"scalar": (), "bias": (5,), "kernel": (3, 4), "stack": (2, 3, 4)}
    tree = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    assert float(optim.global_norm(tree)) == pytest.approx(float(optax.tree.norm(tree)), rel=1e-6)
    tree["bias"][0] = np.nan
    assert np.isnan(optim.global_norm(tree))
