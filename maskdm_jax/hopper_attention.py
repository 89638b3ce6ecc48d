"""Attention for Hopper GPUs (H100, H200), forward and backward: the kernels that training runs on.

The algorithm is FlashAttention-2's (Dao 2023): softmax block by block, with the logarithm of each
query's sum (lse) kept for the backward pass, which computes the weights again. Backward are two
kernels, one for the queries' gradient and one for the keys' and values', so that every sum stays
in registers and its order never changes: unlike cuDNN's, these gradients are the same every time.
At 417 tokens, where cuDNN's tiles are a fifth empty, they take 0.58 of its time, and 0.95 at 4,097
(benchmarks/RESULTS.md). `hopper_pipeline` moves the data.

Rows beyond the last are zero and need no mask, but for the keys: those are masked.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from maskdm_jax.hopper_pipeline import ROWS, TILE_LAYOUT, compute_tiles

# Shared memory is laid out in tiles of so many rows, and a length is a whole number of them.
MULTIPLE = 8
# Each of three workers needs a tile of every head.
MIN_LENGTH = 2 * ROWS + 1
_HEAD_DIM = 64

_LOG2_E = math.log2(math.e)
_SQUARE = (ROWS, ROWS)


def supports(length: int, head_dim: int) -> bool:
    """Whether the kernels take sequences of `length` tokens and heads of `head_dim` channels."""
    return length >= MIN_LENGTH and head_dim == _HEAD_DIM


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def hopper_attention(
    q_BLKH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, num_valid: int
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the first `num_valid` keys, with the softmax in float32.

    Args:
      q_BLKH, k_BLKH, v_BLKH: [B, L, K, H], bfloat16 or float16; see `supports`. L is a multiple of
        `MULTIPLE`.
      num_valid: keys that are not padding, more than L - MULTIPLE.

    Returns:
      [B, L, K, H] of q's dtype.
    """
    return _forward(q_BLKH, k_BLKH, v_BLKH, num_valid)[0]


# Each kernel is lowered once for all blocks of a network, in seconds: a function under jit is.
@functools.partial(jax.jit, static_argnums=3)
def _forward(q, k, v, num_valid):
    dtype, scale = q.dtype, _scale(q)
    last = pl.cdiv(q.shape[1], ROWS) - 1

    def tile(first_row, tiles, tile_rows, stream):
        def step(c, carry, is_last=False):
            out, peak, total = carry
            stream.wait(c)
            k_chunk, v_chunk = stream.arrays(c)
            (scores,) = _products_transposed((tiles[0], k_chunk))
            if is_last:
                scores = _where_key(c * ROWS, num_valid, scores, -jnp.inf)
            # Powers of 2, whose scale joins the subtraction in one instruction.
            new_peak = jnp.maximum(peak, scores.max(axis=1) * scale)
            weights = jnp.exp2(scores * scale - _down(new_peak))
            shrink = jnp.exp2(peak - new_peak)
            total = total * shrink + weights.sum(axis=1)
            (out,) = _add_products((out * _down(shrink), weights.astype(dtype), v_chunk))
            stream.release(c)
            return out, new_peak, total

        start = (_full(_SQUARE, 0.0), _full((ROWS,), -jnp.inf), _full((ROWS,), 0.0))
        out, peak, total = step(last, lax.fori_loop(0, last, step, start), is_last=True)
        return [out / _down(total)], [peak + jnp.log(total) * _LOG2_E]

    out, lse = compute_tiles(
        tile,
        streamed=[k, v],
        tiled=[q],
        num_outputs=1,
        num_row_outputs=1,
        num_workers=3,
        name="hopper_attention_forward",
    )
    return out, (q, k, v, out, lse)


def _backward(num_valid, kept, dout):
    q, k, v, out, lse = kept
    dq, delta = _backward_queries(q, k, v, out, dout, lse, num_valid)
    return dq, *_backward_keys(q, k, v, dout, lse, delta, num_valid)


hopper_attention.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=6)
def _backward_queries(q, k, v, out, dout, lse, num_valid):
    """dq, and delta: what softmax's derivative subtracts, the sum of weights * dweights."""
    scale = _scale(q)
    last = pl.cdiv(q.shape[1], ROWS) - 1

    def tile(first_row, tiles, tile_rows, stream):
        q_tile, out_tile, dout_tile = tiles
        (lse_tile,) = tile_rows
        delta = (out_tile.astype(jnp.float32) * dout_tile.astype(jnp.float32)).sum(axis=1)

        def step(c, dq, is_last=False):
            stream.wait(c)
            k_chunk, v_chunk = stream.arrays(c)
            scores, dweights = _products_transposed((q_tile, k_chunk), (dout_tile, v_chunk))
            weights = jnp.exp2(scores * scale - _down(lse_tile))
            if is_last:
                weights = _where_key(c * ROWS, num_valid, weights, 0.0)
            dscores = weights * (dweights - _down(delta))
            (dq,) = _add_products((dq, dscores.astype(q.dtype), k_chunk))
            stream.release(c)
            return dq

        dq = step(last, lax.fori_loop(0, last, step, _full(_SQUARE, 0.0)), is_last=True)
        return [dq * _HEAD_DIM**-0.5], [delta]

    return compute_tiles(
        tile,
        streamed=[k, v],
        tiled=[q, out, dout],
        tiled_rows=[lse],
        num_outputs=1,
        num_row_outputs=1,
        num_workers=3,
        name="hopper_attention_backward_queries",
    )


@functools.partial(jax.jit, static_argnums=6)
def _backward_keys(q, k, v, dout, lse, delta, num_valid):
    """dk and dv, from transposed scores: keys down, queries across."""
    scale = _scale(q)

    def tile(first_row, tiles, tile_rows, stream):
        k_tile, v_tile = tiles

        def step(c, carry):
            dk, dv = carry
            stream.wait(c)
            q_chunk, dout_chunk = stream.arrays(c)
            lse_chunk, delta_chunk = stream.rows(c)
            scores, dweights = _products_transposed((k_tile, q_chunk), (v_tile, dout_chunk))
            weights = jnp.exp2(scores * scale - _across(lse_chunk))
            dscores = weights * (dweights - _across(delta_chunk))
            dk, dv = _add_products(
                (dk, dscores.astype(q.dtype), q_chunk), (dv, weights.astype(q.dtype), dout_chunk)
            )
            stream.release(c)
            return dk, dv

        start = (_full(_SQUARE, 0.0), _full(_SQUARE, 0.0))
        dk, dv = lax.fori_loop(0, pl.cdiv(q.shape[1], ROWS), step, start)
        key = plgpu.broadcasted_iota(jnp.int32, _SQUARE, 0, layout=TILE_LAYOUT) + first_row
        dk, dv = (jnp.where(key < num_valid, x, 0.0) for x in (dk, dv))
        return [dk * _HEAD_DIM**-0.5, dv], []

    return compute_tiles(
        tile,
        streamed=[q, dout],
        streamed_rows=[lse, delta],
        tiled=[k, v],
        num_outputs=2,
        num_workers=2,
        name="hopper_attention_backward_keys",
    )


def _scale(q):
    return q.shape[-1] ** -0.5 * _LOG2_E


def _products_transposed(*factors):
    """a @ b^T of each (a in registers, b in shared memory), float32 in registers."""

    def multiply(*sums):
        for sum_ref, (a, b_ref) in zip(sums, factors, strict=True):
            plgpu.wgmma(sum_ref, a, b_ref.transpose((1, 0)))
        return tuple(sum_ref[...] for sum_ref in sums)

    return pl.run_scoped(multiply, *[plgpu.ACC(_SQUARE, jnp.float32)] * len(factors))


def _add_products(*terms):
    """sum + a @ b of each (sum and a in registers, b in shared memory)."""

    def multiply(sums):
        for sum_ref, (_, a, b_ref) in zip(sums, terms, strict=True):
            plgpu.wgmma(sum_ref, a, b_ref)

    return pl.run_state(multiply)(tuple(plgpu.ACC.init(start) for start, _, _ in terms))


def _where_key(first_key, num_valid, x, otherwise):
    """x, whose columns are keys, and `otherwise` where the key is padding."""
    key = plgpu.broadcasted_iota(jnp.int32, _SQUARE, 1, layout=TILE_LAYOUT) + first_key
    return jnp.where(key < num_valid, x, otherwise)


def _full(shape, value):
    layout = TILE_LAYOUT if len(shape) == 2 else TILE_LAYOUT.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _down(x):
    """One value for each row of a tile."""
    return lax.broadcast_in_dim(x, _SQUARE, [0])


def _across(x):
    """One value for each column of a tile."""
    return lax.broadcast_in_dim(x, _SQUARE, [1])
