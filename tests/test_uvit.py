import jax
import jax.numpy as jnp
import numpy as np
import pytest
import textbook
from close import assert_close

from maskdm_jax.config import default_config
from maskdm_jax.model import attention, patches, uvit
from maskdm_jax.model.sizes import SIZES
from maskdm_jax.weights import torch_io


def nhwc(array):
    return np.moveaxis(array, -3, -1)


def test_output_on_the_whole_image_equals_the_official_code(golden, official_model):
    model, params = official_model
    tokens = uvit.apply(model, params, patches.patchify(nhwc(golden["x_t"]), 4), golden["t"])
    eps = patches.unpatchify(tokens, 4, (32, 32))
    assert_close(eps, nhwc(golden["eps_full"]), 1e-5)


@pytest.mark.parametrize("kind", ["block", "patch", "crop"])
def test_output_on_visible_patches_equals_the_official_code(golden, official_model, kind):
    model, params = official_model
    visible = np.stack([np.flatnonzero(~row) for row in golden[f"mask_{kind}"]])
    x_t = patches.gather(patches.patchify(nhwc(golden["x_t"]), 4), visible)
    tokens = uvit.apply(model, params, x_t, golden["t"], visible_BV=visible)
    assert_close(tokens, golden[f"tokens_{kind}"], 1e-5)


@pytest.mark.parametrize("size, millions", [("S", 44), ("B", 102)])
def test_sizes_have_the_published_parameter_counts(size, millions):
    config = default_config()
    config.data.image_size = (256, 256) if size == "B" else (64, 64)
    config.model.size = size
    model = uvit.make_model(config)
    abstract = jax.eval_shape(lambda: uvit.init_params(model, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert round(count / 1e6) == millions


@pytest.mark.parametrize("size", ["L", "H"])
def test_large_sizes_divide_into_heads_and_blocks(size):
    config = default_config()
    config.model.size = size
    model = uvit.make_model(config)
    abstract = jax.eval_shape(lambda: uvit.init_params(model, jax.random.key(0)))
    blocks = [name for name in abstract if "block" in name]
    assert len(blocks) == SIZES[size].depth
    assert model.width % model.num_heads == 0


def small(**fields):
    defaults = dict(num_patches=6, patch_dim=12, width=16, depth=3, num_heads=2)
    return uvit.UViT(**(defaults | fields))


def given(model, batch=2):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(batch, model.num_patches, model.patch_dim)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray([3, 700])


def test_an_even_depth_builds_the_network_of_the_next_odd_depth():
    trees = [
        jax.tree.structure(uvit.init_params(small(depth=depth), jax.random.key(0)))
        for depth in (2, 3)
    ]
    assert trees[0] == trees[1]


def test_the_class_changes_the_output_and_has_its_own_no_class_row():
    model = small(num_classes=3)
    params = uvit.init_params(model, jax.random.key(0))
    assert params["class_embed"]["embedding"].shape == (4, 16)
    x, t = given(model)
    first, second, none = (
        uvit.apply(model, params, x, t, label_B=jnp.full((2,), label)) for label in (0, 1, 3)
    )
    assert not np.allclose(first, second) and not np.allclose(first, none)


def test_the_time_mlp_and_qkv_biases_add_their_parameters():
    plain = uvit.init_params(small(), jax.random.key(0))
    params = uvit.init_params(small(mlp_time_embed=True, qkv_bias=True), jax.random.key(0))
    assert set(params) - set(plain) == {"time_mlp_in", "time_mlp_out"}
    assert params["time_mlp_in"]["kernel"].shape == (16, 64)
    assert set(params["mid_block"]) - set(plain["mid_block"]) == {"q_bias", "v_bias"}
    model = small(mlp_time_embed=True, qkv_bias=True)
    x, t = given(model)
    assert uvit.apply(model, params, x, t).shape == x.shape


def test_dropout_acts_in_training_only():
    model = small(dropout=0.5)
    params = uvit.init_params(model, jax.random.key(0))
    x, t = given(model)
    still = uvit.apply(model, params, x, t)
    np.testing.assert_array_equal(still, uvit.apply(small(), params, x, t))
    noisy = uvit.apply(model, params, x, t, dropout_key=jax.random.key(1))
    assert not np.allclose(still, noisy)


def test_bfloat16_stays_near_float32_and_returns_float32():
    params = uvit.init_params(small(), jax.random.key(0))
    x, t = given(small())
    low = uvit.apply(small(dtype=jnp.dtype("bfloat16")), params, x, t)
    assert low.dtype == jnp.float32
    assert_close(low, uvit.apply(small(), params, x, t), 0.03)


def test_running_visible_tokens_equals_running_all_when_all_are_visible():
    params = uvit.init_params(small(), jax.random.key(0))
    x, t = given(small())
    ids = jnp.tile(jnp.arange(6), (2, 1))
    assert_close(
        uvit.apply(small(), params, x, t, visible_BV=ids),
        uvit.apply(small(), params, x, t),
        1e-6,
    )


def test_missing_official_weights_are_named(official_model):
    _, params = official_model
    state = {"model.encoder.encoder_pos_embed": params["position"][None]}
    with pytest.raises(ValueError, match="missing: .*patch_embed.proj.weight.*mid_block"):
        torch_io.from_official(state)
    with pytest.raises(ValueError, match="no weights under"):
        torch_io.from_official({"other": params["position"]})


def test_padding_tokens_change_nothing(tiny_config, monkeypatch):
    model = uvit.make_model(tiny_config)
    params = uvit.init_params(model, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 16, 4))
    t, label = jnp.array([3, 800]), jnp.array([1, 2])
    plain = uvit.apply(model, params, x, t, label_B=label)
    monkeypatch.setattr(attention, "_padding", lambda kernel, num_tokens: 3)
    padded = uvit.apply(model, params, x, t, label_B=label)
    assert_close(padded, plain, 1e-6)


KEY = jax.random.key(0)
OPTIONS = {
    "plain": {},
    "classes": dict(num_classes=3),
    "time-mlp": dict(mlp_time_embed=True),
    "qv-bias": dict(qkv_bias=True),
    "mlp-ratio": dict(mlp_ratio=2.5),
    "all": dict(num_classes=3, mlp_time_embed=True, qkv_bias=True, depth=5),
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_output_and_gradients_are_those_of_a_textbook_uvit(monkeypatch, options, masked):
    fields = dict(num_patches=6, patch_dim=12, width=16, depth=3, num_heads=2) | options
    model, plain = uvit.UViT(**fields), textbook.UViT(**fields)
    params = textbook.perturbed(jax.jit(uvit.init_params, static_argnums=0)(model, KEY))
    visible = jnp.asarray([[1, 2, 5], [0, 3, 4]]) if masked else None
    x = jax.random.normal(jax.random.key(1), (2, 3 if masked else 6, 12))
    t = jnp.asarray([3, 700])
    label = jnp.asarray([1, 3]) if model.num_classes else None

    def computed(apply):
        """(output, (loss, gradients)): the output also as it is without gradients."""
        loss = jax.value_and_grad(lambda params: jnp.square(apply(params)).mean())
        return jax.jit(lambda params: (apply(params), loss(params)))(params)

    def ours(model):
        return computed(lambda p: uvit.apply(model, p, x, t, visible_BV=visible, label_B=label))

    output, gradients = computed(lambda p: plain.apply({"params": p}, x, t, visible, label))
    found = [ours(model)]
    # Padding and remat have separate effects, so one program has both.
    monkeypatch.setattr(attention, "_padding", lambda kernel, num_tokens: 5)
    found.append(ours(model.clone(remat="blocks")))
    for our_output, our_gradients in found:
        assert_close(our_output, output, 1e-5)
        assert_close(our_gradients, gradients, 2e-5)
    assert_close(found[1], found[0], 1e-5)
