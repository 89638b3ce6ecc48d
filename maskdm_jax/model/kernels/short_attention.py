"""Attention over short sequences as one Pallas kernel (Triton, NVIDIA GPUs), forward and backward.

Masked pre-training at 64x64 leaves tens of tokens. XLA's attention then spends its time on padding
and transposing q, k and v for batched matmuls, and cuDNN's kernel on tiles that are mostly empty.
Here one program computes one head of one image in registers: q, k and v are read once, and the
scores are never written. q, k and v are one array, the output of one matmul: three narrow matmuls
fill the GPU badly, and XLA would copy to split q, k and v and to join their gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from maskdm_jax.model.kernels import rows

# Scores of one head stay in one program's registers.
MAX_LENGTH = 128


def supports(length: int, head_dim: int, dtype) -> bool:
    """Whether the kernel supports `length` tokens with heads of `head_dim` channels of `dtype`."""
    fits = length <= MAX_LENGTH and head_dim in (16, 32, 64, 128)
    return fits and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def short_attention(qkv_BLTKH: jax.Array, num_valid: int, interpret: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the first `num_valid` keys, with the softmax in float32.

    Args:
      qkv_BLTKH: q, k and v, [B, L, 3, K, H]; see `supports`.
      num_valid: keys that are not padding, at least 1.
      interpret: run the kernel on the CPU, slowly, for tests.

    Returns:
      [B, L, K, H] of the same dtype.
    """
    return _forward(qkv_BLTKH, num_valid, interpret)[0]


def _forward(qkv, num_valid, interpret):
    batch, length, _, num_heads, head_dim = qkv.shape
    shape = (batch, length, num_heads, head_dim)
    return _call(_forward_kernel, shape, num_valid, interpret, qkv), qkv


def _backward(num_valid, interpret, qkv, dout):
    return (_call(_backward_kernel, qkv.shape, num_valid, interpret, qkv, dout),)


short_attention.defvjp(_forward, _backward)


def _call(kernel, out_shape, num_valid, interpret, *arrays):
    qkv = arrays[0]
    batch, length, _, num_heads, head_dim = qkv.shape
    # Triton's tiles are powers of two, and its matmuls take no fewer than 16 rows.
    num_rows = max(pl.next_power_of_2(length), 16)
    head = pl.BlockSpec((None, num_rows, None, head_dim), lambda b, h: (b, 0, h, 0))
    head_of_each = pl.BlockSpec((None, num_rows, 3, None, head_dim), lambda b, h: (b, 0, 0, h, 0))
    return pl.pallas_call(
        functools.partial(kernel, length=length, num_valid=num_valid),
        out_shape=jax.ShapeDtypeStruct(out_shape, qkv.dtype),
        grid=(batch, num_heads),
        in_specs=[head_of_each, head][: len(arrays)],
        out_specs=head if len(out_shape) == 4 else head_of_each,
        compiler_params=triton.CompilerParams(num_warps=max(num_rows // 16, 1), num_stages=1),
        interpret=interpret,
        name="short_attention" + kernel.__name__,
    )(*arrays)


def _forward_kernel(qkv_ref, out_ref, *, length, num_valid):
    q, k, v = (_load(_part(qkv_ref, i), length) for i in range(3))
    weights = _weights(q, k, num_valid)
    _store(out_ref, triton.dot(weights.astype(v.dtype), v), length)


def _backward_kernel(qkv_ref, dout_ref, dqkv_ref, *, length, num_valid):
    q, k, v = (_load(_part(qkv_ref, i), length) for i in range(3))
    dout = _load(dout_ref, length)
    weights = _weights(q, k, num_valid)
    dv = triton.dot(weights.astype(dout.dtype), dout, trans_a=True)
    dweights = triton.dot(dout, v, trans_b=True)
    # softmax's derivative: dscores = w * (dw - sum(w * dw)).
    dscores = weights * (dweights - jnp.sum(weights * dweights, axis=1, keepdims=True))
    dscores = (dscores * q.shape[1] ** -0.5).astype(q.dtype)
    dq, dk = triton.dot(dscores, k), triton.dot(dscores, q, trans_a=True)
    for i, gradient in enumerate((dq, dk, dv)):
        _store(_part(dqkv_ref, i), gradient, length)


def _weights(q, k, num_valid):
    scores = triton.dot(q, k, trans_b=True) * q.shape[1] ** -0.5
    valid = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < num_valid
    scores = jnp.where(valid, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _part(ref, i):
    return ref.at[:, np.int32(i)]  # interpret mode fails on a plain int


def _load(ref, length):
    return rows.load(ref, rows.below(ref.shape, length))


def _store(ref, value, length):
    rows.store(ref, value, rows.below(ref.shape, length))
