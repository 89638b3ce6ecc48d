"""Attention for Hopper GPUs (H100, H200), forward and backward.

The algorithm is FlashAttention-2 (Dao 2023): softmax block by block; the logarithm of each query's
sum (lse) is kept for the backward pass, which recomputes the weights. The backward pass is two
kernels, one for the gradient of q and one for those of k and v: every sum stays in registers and
has a fixed order, so these gradients, unlike cuDNN's, are deterministic. The kernels take 0.6 of
cuDNN's time at 417 tokens, where its tiles are a fifth empty, and 0.9 at 4,097
(benchmarks/RESULTS.md). `hopper_pipeline` moves the data.

A tile is 64 queries (or keys); it is multiplied with chunks of 64 keys (or queries). The one or two
tokens of a whole image beyond a multiple of 64 are handled as vectors, before the loop over chunks.
Rows beyond the last token are zero and need no mask, except keys, which are masked.

Long sequences have a second loop, without the running maximum of softmax: by the Cauchy-Schwarz
inequality, the longest query of a tile and the longest key bound its scores. If scores within the
bound could overflow an exponential or make a sum vanish, the tile takes the loop with the maximum.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from maskdm_jax.model.kernels.hopper_pipeline import ROWS, TILE_LAYOUT, compute_tiles

# Each of the three workers needs a tile in every head.
MIN_LENGTH = 2 * ROWS + 1
_HEAD_DIM = 64
# Up to this many tokens at the end are multiplied as vectors instead of filling a chunk. Whole
# images have one or two beyond a multiple of 64: the time, and a label.
_MAX_TAIL = 2
# From this length on, skipping the running maximum saves more than scanning all keys costs.
_BOUNDED_FROM = 1024
# Scores are in log2: a weight is 2^score. If all scores of a row are in [-96, 96], the sum of 2^15
# weights is less than 2^111, and what float32 rounds to zero is negligible in it. float16's
# exponent range is too small for such weights.
_MAX_SCORE = 96.0

_LOG2_E = math.log2(math.e)
_SCALE = _HEAD_DIM**-0.5 * _LOG2_E  # from products q k^T to scores in log2
_SQUARE = (ROWS, ROWS)


def supports(length: int, head_dim: int, dtype) -> bool:
    """Whether the kernels support `length` tokens with heads of `head_dim` channels of `dtype`."""
    return length >= MIN_LENGTH and head_dim == _HEAD_DIM and dtype == jnp.bfloat16


@jax.custom_vjp
def hopper_attention(qkv_BLTKH: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, with the softmax in float32.

    Args:
      qkv_BLTKH: q, k and v, [B, L, 3, K, H], bfloat16; see `supports`.

    Returns:
      [B, L, K, H] of the same dtype.

    Raises:
      ValueError: for fewer tokens than `MIN_LENGTH`.
    """
    return _forward(qkv_BLTKH)[0]


# Under jit, each kernel is lowered once for all blocks of a network; lowering takes seconds.
@jax.jit
def _forward(qkv):
    length, num_heads, dtype = qkv.shape[1], qkv.shape[3], qkv.dtype
    heads = _heads(qkv)
    tail = _tail(length)
    head_rows = [*_tail_rows(qkv[:, :, 1]), *_tail_rows(qkv[:, :, 2])]
    bounded = length >= _BOUNDED_FROM
    if bounded:
        squares = jnp.square(qkv[:, :, 1].astype(jnp.float32))
        head_rows.append(_head_row(squares.sum(axis=3).max(axis=1) * _SCALE**2))

    def tile(tiles, tile_rows, head_rows, stream):
        (q_tile,) = tiles
        queries = q_tile.astype(jnp.float32)
        keys, values = head_rows[:tail], head_rows[tail : 2 * tail]
        tail_scores = [(queries * _across(key)).sum(axis=1) * _SCALE for key in keys]

        def start(peak):
            out, total = _full(_SQUARE, 0.0), _full((ROWS,), 0.0)
            for score, value in zip(tail_scores, values, strict=True):
                weight = jnp.exp2(score - peak)
                out, total = out + _down(weight) * _across(value), total + weight
            return out, total

        def scores_of(c, is_last):
            stream.wait(c)
            k_chunk, v_chunk = stream.arrays(c)
            (scores,) = _products_transposed((q_tile, k_chunk))
            if is_last:
                scores = _where_key(c * ROWS, length, scores, -jnp.inf)
            return scores, v_chunk

        def online():
            def step(c, carry, is_last=False):
                out, peak, total = carry
                scores, v_chunk = scores_of(c, is_last)
                # Powers of 2: scaling and subtraction are then one instruction.
                new_peak = jnp.maximum(peak, scores.max(axis=1) * _SCALE)
                weights = jnp.exp2(scores * _SCALE - _down(new_peak))
                shrink = jnp.exp2(peak - new_peak)
                total = total * shrink + weights.sum(axis=1)
                (out,) = _add_products((out * _down(shrink), weights.astype(dtype), v_chunk))
                stream.release(c)
                return out, new_peak, total

            peak = functools.reduce(jnp.maximum, tail_scores, _full((ROWS,), -jnp.inf))
            out, total = start(peak)
            return _over_chunks(length, step, (out, peak, total))

        def without_peak():
            def step(c, carry, is_last=False):
                out, totals = carry
                scores, v_chunk = scores_of(c, is_last)
                weights = jnp.exp2(scores * _SCALE)
                (out,) = _add_products((out, weights.astype(dtype), v_chunk))
                stream.release(c)
                return out, totals + weights

            out, total = start(0.0)
            out, totals = _over_chunks(length, step, (out, _full(_SQUARE, 0.0)))
            return out, _full((ROWS,), 0.0), total + totals.sum(axis=1)

        if bounded:
            largest = (queries * queries * _across(head_rows[-1])).sum(axis=1)
            is_bounded = stream.turn(largest).max() < _MAX_SCORE**2
            out, peak, total = lax.cond(is_bounded, without_peak, online)
        else:
            out, peak, total = online()
        return [out / _down(total)], [peak + jnp.log(total) * _LOG2_E]

    out, lse = compute_tiles(
        tile,
        num_heads=num_heads,
        streamed=[(heads, num_heads), (heads, 2 * num_heads)],
        num_chunks=_num_chunks(length),
        tiled=[(heads, 0)],
        head_rows=head_rows,
        output=(_like(heads, num_heads), 0),
        num_outputs=1,
        num_row_outputs=1,
        num_workers=3,
        name="hopper_attention_forward",
    )
    return out, (qkv, out, lse)


def _backward(kept, dout):
    qkv, out, lse = kept
    dqkv, delta = _backward_queries(qkv, out, dout, lse)
    dqkv = _backward_keys(qkv, dout, lse, delta, dqkv)
    return (dqkv.reshape(qkv.shape),)


hopper_attention.defvjp(_forward, _backward)


@jax.jit
def _backward_queries(qkv, out, dout, lse):
    """dq, and delta, the sum of weights * dweights that softmax's derivative subtracts.

    dq is the first K heads of an array of 3 K, laid out as in `_heads`; the others are arbitrary.
    """
    length, num_heads, dtype = qkv.shape[1], qkv.shape[3], qkv.dtype
    heads = _heads(qkv)
    tail = _tail(length)

    def tile(tiles, tile_rows, head_rows, stream):
        q_tile, out_tile, dout_tile = tiles
        (lse_tile,) = tile_rows
        dout = dout_tile.astype(jnp.float32)
        delta = (out_tile.astype(jnp.float32) * dout).sum(axis=1)

        def step(c, dq, is_last=False):
            stream.wait(c)
            k_chunk, v_chunk = stream.arrays(c)
            scores, dweights = _products_transposed((q_tile, k_chunk), (dout_tile, v_chunk))
            weights = jnp.exp2(scores * _SCALE - _down(lse_tile))
            if is_last:
                weights = _where_key(c * ROWS, length, weights, 0.0)
            dscores = weights * (dweights - _down(delta))
            (dq,) = _add_products((dq, dscores.astype(dtype), k_chunk))
            stream.release(c)
            return dq

        dq = _full(_SQUARE, 0.0)
        for key, value in zip(head_rows[:tail], head_rows[tail:], strict=True):
            score = (q_tile.astype(jnp.float32) * _across(key)).sum(axis=1)
            dweight = (dout * _across(value)).sum(axis=1)
            dscore = jnp.exp2(score * _SCALE - lse_tile) * (dweight - delta)
            dq = dq + _down(dscore) * _across(key)
        dq = _over_chunks(length, step, dq)
        return [dq * _HEAD_DIM**-0.5], [delta]

    return compute_tiles(
        tile,
        num_heads=num_heads,
        streamed=[(heads, num_heads), (heads, 2 * num_heads)],
        num_chunks=_num_chunks(length),
        tiled=[(heads, 0), (out, 0), (dout, 0)],
        tiled_rows=[lse],
        head_rows=[*_tail_rows(qkv[:, :, 1]), *_tail_rows(qkv[:, :, 2])],
        output=(_like(heads, 3 * num_heads), 0),
        num_outputs=1,
        num_row_outputs=1,
        num_workers=3,
        name="hopper_attention_backward_queries",
    )


@jax.jit
def _backward_keys(qkv, dout, lse, delta, dqkv):
    """dqkv with dk and dv filled in, from transposed scores: keys down, queries across."""
    length, num_heads, dtype = qkv.shape[1], qkv.shape[3], qkv.dtype
    heads = _heads(qkv)
    tail = _tail(length)
    head_rows = [*_tail_rows(qkv[:, :, 0]), *_tail_rows(dout)]
    for x in (lse, delta):  # a 64th in each column, subtracted before the sum over columns
        head_rows += [_head_row(x[:, :, length - 1 - i] / _HEAD_DIM) for i in range(tail)]

    def tile(tiles, tile_rows, head_rows, stream):
        k_tile, v_tile = tiles

        def step(c, carry):
            dk, dv = carry
            stream.wait(c)
            q_chunk, dout_chunk = stream.arrays(c)
            lse_chunk, delta_chunk = stream.rows(c)
            # Starting the products from -delta saves a subtraction.
            scores, less_delta = _add_products(
                (_full(_SQUARE, 0.0), k_tile, q_chunk.transpose((1, 0))),
                (_across(-delta_chunk), v_tile, dout_chunk.transpose((1, 0))),
            )
            weights = jnp.exp2(scores * _SCALE - _across(lse_chunk))
            dscores = weights * less_delta
            dk, dv = _add_products(
                (dk, dscores.astype(dtype), q_chunk), (dv, weights.astype(dtype), dout_chunk)
            )
            stream.release(c)
            return dk, dv

        dk, dv = _full(_SQUARE, 0.0), _full(_SQUARE, 0.0)
        keys, values = k_tile.astype(jnp.float32), v_tile.astype(jnp.float32)
        for i in range(tail):
            query, dout, lse, delta = (_across(x) for x in head_rows[i::tail])
            weight = jnp.exp2((keys * query * _SCALE - lse).sum(axis=1))
            dscore = weight * (values * dout - delta).sum(axis=1)
            dk, dv = dk + _down(dscore) * query, dv + _down(weight) * dout
        dk, dv = lax.fori_loop(0, _num_chunks(length), step, (dk, dv))
        return [dk * _HEAD_DIM**-0.5, dv], []

    (dqkv,) = compute_tiles(
        tile,
        num_heads=num_heads,
        streamed=[(heads, 0), (dout, 0)],
        streamed_rows=[lse, delta],
        num_chunks=_num_chunks(length),
        tiled=[(heads, num_heads), (heads, 2 * num_heads)],
        head_rows=head_rows,
        output=(dqkv, num_heads),
        num_outputs=2,
        num_workers=2,
        name="hopper_attention_backward_keys",
    )
    return dqkv


def _heads(qkv_BLTKH):
    """[B, L, 3 K, H]: heads of q, then of k, then of v."""
    batch, length, _, num_heads, head_dim = qkv_BLTKH.shape
    return qkv_BLTKH.reshape(batch, length, 3 * num_heads, head_dim)


def _like(heads, count):
    """The shape and dtype of `heads`, but with `count` heads."""
    batch, length, _, head_dim = heads.shape
    return jax.ShapeDtypeStruct((batch, length, count, head_dim), heads.dtype)


def _tail(length):
    return length % ROWS if length % ROWS <= _MAX_TAIL else 0


def _num_chunks(length):
    return pl.cdiv(length - _tail(length), ROWS)


def _over_chunks(length, step, carry):
    """Loops over the chunks of keys; if the last is not full, its step masks the rest."""
    full = (length - _tail(length)) // ROWS
    carry = lax.fori_loop(0, full, step, carry)
    return carry if full == _num_chunks(length) else step(full, carry, is_last=True)


def _tail_rows(x_BLKH):
    """Float32 [B, K, H] of each token in the tail, the last token first."""
    length = x_BLKH.shape[1]
    return [x_BLKH[:, length - 1 - i].astype(jnp.float32) for i in range(_tail(length))]


def _head_row(x_BK):
    return lax.broadcast_in_dim(x_BK, (*x_BK.shape, _HEAD_DIM), (0, 1))


def _products_transposed(*factors):
    """a @ b^T for each (a in registers, b in shared memory), float32 in registers."""

    def multiply(*sums):
        for sum_ref, (a, b_ref) in zip(sums, factors, strict=True):
            plgpu.wgmma(sum_ref, a, b_ref.transpose((1, 0)))
        return tuple(sum_ref[...] for sum_ref in sums)

    return pl.run_scoped(multiply, *[plgpu.ACC(_SQUARE, jnp.float32)] * len(factors))


def _add_products(*terms):
    """sum + a @ b for each (sum and a in registers, b in shared memory)."""

    def multiply(sums):
        for sum_ref, (_, a, b_ref) in zip(sums, terms, strict=True):
            plgpu.wgmma(sum_ref, a, b_ref)

    return pl.run_state(multiply)(tuple(plgpu.ACC.init(start) for start, _, _ in terms))


def _where_key(first_key, length, x, otherwise):
    """x, whose columns are keys, with `otherwise` in columns beyond the last key."""
    key = plgpu.broadcasted_iota(jnp.int32, _SQUARE, 1, layout=TILE_LAYOUT) + first_key
    return jnp.where(key < length, x, otherwise)


def _full(shape, value):
    layout = TILE_LAYOUT if len(shape) == 2 else TILE_LAYOUT.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _down(x):
    """One value for each row of a tile."""
    return lax.broadcast_in_dim(x, _SQUARE, [0])


def _across(x):
    """One value for each column of a tile."""
    return lax.broadcast_in_dim(x, _SQUARE, [1])
