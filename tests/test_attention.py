"""Every implementation is softmax attention; kernels run in interpret mode on the CPU."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax import attention
from maskdm_jax.attention import attend
from maskdm_jax.short_attention import MAX_LENGTH, short_attention


def qkv(length, num_heads=2, head_dim=16):
    shape = (3, 1, length, num_heads, head_dim)
    return np.random.default_rng(length).normal(size=shape).astype(np.float32)


def softmax_attention(q, k, v, num_valid):
    scores = np.einsum("blkh,bmkh->bklm", q, k[:, :num_valid]) / q.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bklm,bmkh->blkh", weights, v[:, :num_valid])


def interpreted(q, k, v, num_valid):
    return short_attention(q, k, v, num_valid, True)


def by_xla(q, k, v, num_valid):
    return attend(q, k, v, "xla", num_valid=num_valid)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("length", [5, 17, 417, 4097])
@pytest.mark.parametrize("implementation", [by_xla, interpreted])
def test_it_is_softmax_attention(implementation, length, padding):
    if implementation is interpreted and length > MAX_LENGTH:
        length = MAX_LENGTH - padding
    q, k, v = qkv(length + padding, num_heads=1)
    out = jax.jit(implementation, static_argnums=3)(q, k, v, length)
    expected = softmax_attention(q, k, v, length)
    np.testing.assert_allclose(out[:, :length], expected[:, :length], atol=1e-5)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("length, num_valid", [(29, 29), (53, 50)])
def test_the_kernels_gradients_are_those_of_xla(length, num_valid):
    q, k, v = qkv(length)
    dout = np.zeros_like(q)
    dout[:, :num_valid] = qkv(length)[0][:, :num_valid]

    def gradients(implementation):
        _, pullback = jax.vjp(lambda *a: implementation(*a, num_valid), q, k, v)
        return pullback(dout)

    for ours, xla in zip(gradients(interpreted), gradients(by_xla), strict=True):
        np.testing.assert_allclose(ours, xla, atol=1e-5)


@pytest.mark.parametrize("kernel", ["cudnn", "pallas"])
def test_a_kernel_that_the_machine_lacks_falls_back_with_one_warning(kernel):
    attention._warn_once.cache_clear()
    q, k, v = qkv(17)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = attend(q, k, v, kernel), attend(q, k, v, kernel)
    np.testing.assert_allclose(first, softmax_attention(q, k, v, 17), atol=1e-5)
    np.testing.assert_array_equal(first, second)
    assert len(caught) == 1 and kernel in str(caught[0].message)


def test_a_gpu_chooses_by_length_and_pads_to_even(monkeypatch):
    monkeypatch.setattr(attention, "_misses", lambda *args: "")
    bf16 = jnp.bfloat16
    assert attention.choose("auto", 29, 64, bf16) == "pallas"
    assert attention.choose("auto", 4097, 64, bf16) == "cudnn"
    assert attention.choose("xla", 4097, 64, bf16) == "xla"
    assert attention.padding("auto", 4097, 64, bf16) == 1
    assert attention.padding("auto", 418, 64, bf16) == attention.padding("auto", 29, 64, bf16) == 0


def test_an_unknown_implementation_is_named():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="'flashy'"):
        attend(x, x, x, "flashy")
