"""Attention over short sequences as one Pallas kernel (Triton, NVIDIA GPUs), forward and backward.

Masked pre-training at 64x64 leaves tens of tokens. XLA's attention then spends its time on padding
and transposing q, k and v for batched matmuls, and cuDNN's kernel on tiles that are mostly empty.
Here one program computes one head of one image out of registers: q, k and v are read once, and the
scores are never written.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Scores of one head stay in one program's registers.
MAX_LENGTH = 128


def supports(length: int, head_dim: int) -> bool:
    """Whether the kernel takes sequences of `length` tokens and heads of `head_dim` channels."""
    return length <= MAX_LENGTH and head_dim in (16, 32, 64, 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def short_attention(
    q_BLKH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    num_valid: int,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the first `num_valid` keys, with the softmax in float32.

    Args:
      q_BLKH, k_BLKH, v_BLKH: [B, L, K, H]; see `supports`.
      num_valid: keys that are not padding, at least 1.
      interpret: run the kernel on the CPU, slowly, for tests.

    Returns:
      [B, L, K, H] of q's dtype.
    """
    return _forward(q_BLKH, k_BLKH, v_BLKH, num_valid, interpret)[0]


def _forward(q, k, v, num_valid, interpret):
    (out,) = _call(_forward_kernel, 1, num_valid, interpret, q, k, v)
    return out, (q, k, v)


def _backward(num_valid, interpret, kept, dout):
    return tuple(_call(_backward_kernel, 3, num_valid, interpret, *kept, dout))


short_attention.defvjp(_forward, _backward)


def _call(kernel, num_outputs, num_valid, interpret, *arrays):
    batch, length, num_heads, head_dim = arrays[0].shape
    # Triton's tiles are powers of two, and its matmuls take no fewer than 16 rows.
    rows = max(pl.next_power_of_2(length), 16)
    head = pl.BlockSpec((None, rows, None, head_dim), lambda b, h: (b, 0, h, 0))
    return pl.pallas_call(
        functools.partial(kernel, length=length, num_valid=num_valid),
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * num_outputs,
        grid=(batch, num_heads),
        in_specs=[head] * len(arrays),
        out_specs=[head] * num_outputs,
        compiler_params=triton.CompilerParams(num_warps=max(rows // 16, 1), num_stages=1),
        interpret=interpret,
        name="short_attention" + kernel.__name__,
    )(*arrays)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, length, num_valid):
    q, k, v = (_load(ref, length) for ref in (q_ref, k_ref, v_ref))
    weights = _weights(q, k, num_valid)
    _store(out_ref, triton.dot(weights.astype(v.dtype), v), length)


def _backward_kernel(q_ref, k_ref, v_ref, dout_ref, dq_ref, dk_ref, dv_ref, *, length, num_valid):
    q, k, v, dout = (_load(ref, length) for ref in (q_ref, k_ref, v_ref, dout_ref))
    weights = _weights(q, k, num_valid)
    _store(dv_ref, triton.dot(weights.astype(dout.dtype), dout, trans_a=True), length)
    dweights = triton.dot(dout, v, trans_b=True)
    # softmax's derivative: dscores = w * (dw - sum(w * dw)).
    dscores = weights * (dweights - jnp.sum(weights * dweights, axis=1, keepdims=True))
    dscores = (dscores * q.shape[1] ** -0.5).astype(q.dtype)
    _store(dq_ref, triton.dot(dscores, k), length)
    _store(dk_ref, triton.dot(dscores, q, trans_a=True), length)


def _weights(q, k, num_valid):
    scores = triton.dot(q, k, trans_b=True) * q.shape[1] ** -0.5
    valid = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < num_valid
    scores = jnp.where(valid, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _load(ref, length):
    return triton.load(ref, mask=_valid_rows(ref, length), other=0.0)


def _store(ref, value, length):
    triton.store(ref, value.astype(ref.dtype), mask=_valid_rows(ref, length))


def _valid_rows(ref, length):
    return jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0) < length
