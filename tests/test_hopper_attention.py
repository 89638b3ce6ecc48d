"""The kernels for Hopper GPUs: their schedule and numbers in JAX's interpret mode on the CPU, and
unmodified on such a GPU (`make test-gpu`).

Interpret mode simulates warpgroups, copies and barriers, and detects a deadlock. It has no matmul
with its left side in registers, so the two functions that multiply are replaced, and no two views
of the same bytes, so blocks of shared memory have one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from maskdm_jax import sharding
from maskdm_jax.model.attention import Plan, attend
from maskdm_jax.model.kernels import hopper_attention, hopper_pipeline

needs_hopper = pytest.mark.skipif(
    getattr(jax.devices()[0], "compute_capability", None) != "9.0",
    reason="This needs a Hopper GPU.",
)

needs_interpreter = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason="This needs a CPU and the interpreter of JAX 0.11, which needs Python 3.12.",
)


def inputs(length, batch=2, num_heads=3):
    shape = (batch, length, num_heads, 64)
    return [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(4)]


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(kernel, q, k, v, dout):
    out, pullback = jax.vjp(lambda *qkv: attend(*qkv, plan_of(kernel, q)), q, k, v)
    return out, *pullback(dout.astype(out.dtype))


def plan_of(kernel, q):
    return Plan(kernel, q.shape[1], q.shape[1], None)


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs kernels in interpret mode, as two blocks that share the work."""

    def products_transposed(*factors):
        return tuple(_dot(a, b_ref[...].T) for a, b_ref in factors)

    def add_products(*terms):
        return tuple(start + _dot(a, b_ref[...]) for start, a, b_ref in terms)

    monkeypatch.setattr(hopper_attention, "_products_transposed", products_transposed)
    monkeypatch.setattr(hopper_attention, "_add_products", add_products)
    monkeypatch.setattr(hopper_pipeline, "_NUM_BLOCKS", 2)
    monkeypatch.setattr(
        hopper_pipeline,
        "_shared_array",
        lambda count, head_dim, dtype: plgpu.SMEM((count, hopper_pipeline.ROWS, head_dim), dtype),
    )
    monkeypatch.setattr(hopper_pipeline, "_plain", lambda blocks: blocks)
    monkeypatch.setattr(hopper_pipeline, "_tiled", lambda blocks: blocks)
    jax.clear_caches()  # of traces with the real functions
    with plgpu.force_gpu_interpret_mode():
        yield
    jax.clear_caches()


def _dot(a, b):
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))


@needs_interpreter
# Heads that fit into shared memory; for 641 tokens only the forward kernel's do, and 11 tiles are
# not a whole number of passes for 2 or 3 workers. Three lengths have a tail of one token or two;
# 143 and 647 are lengths with pooled tokens.
@pytest.mark.parametrize(
    "length, num_heads", [(190, 3), (257, 3), (130, 1), (641, 1), (143, 1), (647, 1)]
)
def test_interpreted_outputs_and_gradients_are_those_of_softmax_attention(
    interpreted, length, num_heads
):
    arrays = inputs(length, batch=1, num_heads=num_heads)
    got = hopper_output_and_gradients(*arrays)
    for ours, true in zip(got, exact_output_and_gradients(*arrays), strict=True):
        assert relative_error(ours, true) < 4e-3


@needs_interpreter
def test_long_sequences_are_right_with_and_without_the_running_maximum(interpreted, monkeypatch):
    monkeypatch.setattr(hopper_attention, "_BOUNDED_FROM", 0)
    arrays = inputs(193, batch=2, num_heads=1)
    got = hopper_output_and_gradients(*arrays)
    for ours, true in zip(got, exact_output_and_gradients(*arrays), strict=True):
        assert relative_error(ours, true) < 4e-3

    q, k, v, dout = arrays
    k = k.at[1].multiply(40)  # the second image's exponentials overflow without the maximum
    out = hopper_attention.hopper_attention(jnp.stack([q, k, v], axis=2))
    assert relative_error(out, exact_output_and_gradients(q, k, v, dout)[0]) < 4e-3
    check_neighbours_that_disagree(193)


def check_neighbours_that_disagree(length):
    """One of the tiles that a block computes side by side needs the maximum, the others do not."""
    q, k, v, dout = inputs(length, batch=1, num_heads=1)
    q = q.at[:, 64:128].multiply(40)
    got = hopper_output_and_gradients(q, k, v, dout)
    for ours, true in zip(got, exact_output_and_gradients(q, k, v, dout), strict=True):
        assert relative_error(ours, true) < 3e-2  # weights near 0 and 1: rounding matters more


def hopper_output_and_gradients(q, k, v, dout):
    qkv = jnp.stack([q, k, v], axis=2)
    out, pullback = jax.vjp(hopper_attention.hopper_attention, qkv)
    (dqkv,) = pullback(dout)
    return out, *jnp.unstack(dqkv, axis=2)


def exact_output_and_gradients(*arrays):
    exact = [x.astype(jnp.float32) for x in arrays]
    return output_and_gradients("xla", *exact)


def test_fewer_tokens_than_the_workers_need_are_an_error():
    q, k, v, _ = inputs(128)
    with pytest.raises(ValueError, match="128 tokens for 3 workers"):
        hopper_attention.hopper_attention(jnp.stack([q, k, v], axis=2))


@pytest.mark.parametrize("length", [129, 417, 4097, 4098])
def test_the_kernels_lower_for_a_gpu(length):
    x = jax.ShapeDtypeStruct((2, length, 3, 64), jnp.bfloat16)
    lowered = (
        jax.jit(hopper_output_and_gradients)
        .trace(x, x, x, x)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    for kernel in ("forward", "backward_queries"):  # JAX 0.10 has another name for the third
        assert f"hopper_attention_{kernel}" in lowered
    assert lowered.count("@mosaic_gpu") == 3


def test_the_kernels_lower_on_a_mesh_with_activations_recomputed(tiny_config):
    mesh = sharding.make_mesh(tiny_config)
    qkv = jax.ShapeDtypeStruct((mesh.size, 130, 3, 1, 64), jnp.bfloat16)
    kernel = sharding.on_each_device(hopper_attention.hopper_attention, mesh, mesh.size)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jax.checkpoint(kernel)(x), dtype=jnp.float32)))
    lowered = gradient.trace(qkv).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu") == 3


def test_supports_is_false_for_what_the_kernels_do_not_take():
    assert hopper_attention.supports(129, 64, jnp.bfloat16)
    assert not hopper_attention.supports(128, 64, jnp.bfloat16)
    assert not hopper_attention.supports(417, 72, jnp.bfloat16)
    assert not hopper_attention.supports(417, 64, jnp.float16)  # its exponents are too small


@needs_hopper
@pytest.mark.parametrize("length", [129, 143, 170, 185, 190, 258, 417, 647, 1025, 1026, 4097])
def test_outputs_and_gradients_are_those_of_float32_softmax_attention(length):
    arrays = inputs(length)
    with jax.default_matmul_precision("highest"):
        expected = exact_output_and_gradients(*arrays)
    got = output_and_gradients("hopper", *arrays)
    # Ours are rounded to bfloat16, once on the way and once at the end.
    for ours, true in zip(got, expected, strict=True):
        assert relative_error(ours, true) < 4e-3


@needs_hopper
@pytest.mark.parametrize("length", [417, 4097])
def test_gradients_are_the_same_bits_every_time(length):
    arrays = inputs(length, batch=8)
    first, second = (output_and_gradients("hopper", *arrays) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@needs_hopper
def test_tiles_side_by_side_use_the_maximum_independently():
    with jax.default_matmul_precision("highest"):
        check_neighbours_that_disagree(1025)


@needs_hopper
@pytest.mark.parametrize("length", [417, 1025])
def test_large_scores_do_not_overflow(length):
    q, k, v, _ = inputs(length)
    out = attend(q * 100, k * 100, v, plan_of("hopper", q))
    assert np.isfinite(np.asarray(out, np.float32)).all()
    exact = [x.astype(jnp.float32) for x in (q * 100, k * 100, v)]
    with jax.default_matmul_precision("highest"):
        assert relative_error(out, attend(*exact, plan_of("xla", q))) < 4e-3
