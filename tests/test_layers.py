"""Our backward rules against JAX's own differentiation of the textbook formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from maskdm_jax import sharding
from maskdm_jax.model import layers
from maskdm_jax.model.kernels import gelu, norm


def textbook_norm(x):
    x = x.astype(jnp.float32)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def textbook_gelu(x, bias):
    return jax.nn.gelu(x.astype(jnp.float32) + bias, approximate=False)


def inputs(*shapes, dtype=jnp.float32):
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(1, 2, shape), dtype) for shape in shapes]


@pytest.mark.parametrize(
    "ours, textbook, shapes",
    [
        (layers.normalize, textbook_norm, [(3, 5, 16)]),
        (layers.bias_gelu, textbook_gelu, [(15, 16), (16,)]),
        (layers.add_to_first, lambda x, bias: x.at[:, :16].add(bias), [(15, 48), (16,)]),
        (partial(gelu.bias_gelu, interpret=True), textbook_gelu, [(128, 256), (256,)]),
        (partial(gelu.bias_gelu, interpret=True), textbook_gelu, [(70, 128), (128,)]),
    ],
    ids=["normalize", "bias_gelu", "add_to_first", "kernel", "kernel-part-of-a-tile"],
)
def test_values_and_gradients_are_those_of_the_formula(ours, textbook, shapes):
    *arguments, dout = inputs(*shapes, shapes[0])
    value, pullback = jax.vjp(ours, *arguments)
    expected, expected_pullback = jax.vjp(textbook, *arguments)
    assert_close(value, expected, 1e-6)
    for got, wanted in zip(pullback(dout), expected_pullback(dout), strict=True):
        assert_close(got, wanted, 2e-6)


@pytest.mark.parametrize("ours, textbook", [(layers.normalize, textbook_norm)])
def test_bfloat16_is_rounded_once(ours, textbook):
    (x,) = inputs((4, 64), dtype=jnp.bfloat16)
    out = ours(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, textbook(x).astype(jnp.bfloat16))


def test_a_large_mean_costs_no_digits():
    (x,) = inputs((4, 64))
    assert_close(layers.normalize(x + 1000), layers.normalize(x), 1e-4)


def test_the_gelu_kernel_runs_on_each_device_of_a_mesh(tiny_config):
    mesh = sharding.make_mesh(tiny_config)
    x, bias, dout = inputs((64, 128), (128,), (64, 128))
    x, dout = jax.device_put((x, dout), sharding.batch_sharding(mesh))
    kernel = sharding.on_each_device(
        partial(gelu.bias_gelu, interpret=True), mesh, len(x), num_whole=1
    )
    value, pullback = jax.vjp(kernel, x, bias)
    expected, expected_pullback = jax.vjp(textbook_gelu, x, bias)
    assert value.sharding.num_devices == 8 and not value.sharding.is_fully_replicated
    assert_close(value, expected, 1e-6)
    for got, wanted in zip(pullback(dout), expected_pullback(dout), strict=True):
        assert_close(got, wanted, 2e-6)


def textbook_add_normalize(x, y, bias):
    total = x + y + bias
    return total, textbook_norm(total)


def add_normalize_by_kernel(x, y, bias, mesh, monkeypatch):
    kernel = partial(norm.add_normalize_gradient, interpret=True)
    monkeypatch.setattr(norm, "add_normalize_gradient", kernel)
    return layers._add_normalize(x, y, bias, mesh)


@pytest.mark.parametrize(
    "shape, on_mesh, kernel",
    [
        ((15, 16), False, False),
        ((128, 512), False, True),
        ((70, 256), False, True),
        ((8 * 70, 256), True, True),
    ],
    ids=["plain", "kernel", "kernel-part-of-a-tile", "kernel-on-a-mesh"],
)
def test_add_normalize_and_its_gradients(shape, on_mesh, kernel, tiny_config, monkeypatch):
    x, y, bias = inputs(shape, shape, shape[1:])
    gradients = tuple(inputs(shape, shape))
    mesh = sharding.make_mesh(tiny_config) if on_mesh else None
    if on_mesh:
        x, y, gradients = jax.device_put((x, y, gradients), sharding.batch_sharding(mesh))
    by_kernel = partial(add_normalize_by_kernel, monkeypatch=monkeypatch)
    ours = by_kernel if kernel else layers.add_normalize
    values, pullback = jax.vjp(lambda *given: ours(*given, mesh), x, y, bias)
    expected, expected_pullback = jax.vjp(textbook_add_normalize, x, y, bias)
    for got, wanted in zip(values, expected, strict=True):
        assert_close(got, wanted, 2e-6)
    for got, wanted in zip(pullback(gradients), expected_pullback(gradients), strict=True):
        assert_close(got, wanted, 2e-6)


def test_the_norm_kernel_rounds_bfloat16_once():
    x, dx, dnormed = inputs((70, 256), (70, 256), (70, 256), dtype=jnp.bfloat16)
    kernel = partial(norm.add_normalize_gradient, epsilon=1e-5, interpret=True)
    got, sums = kernel(x, dx, dnormed)
    wanted, wanted_sums = kernel(*(a.astype(jnp.float32) for a in (x, dx, dnormed)))
    assert got.dtype == jnp.bfloat16 and sums.dtype == jnp.float32 and sums.shape == (2, 256)
    np.testing.assert_array_equal(got, wanted.astype(jnp.bfloat16))
    assert_close(sums, wanted_sums, 1e-6)
