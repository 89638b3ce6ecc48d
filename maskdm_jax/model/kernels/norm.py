"""The gradient of a residual sum and its LayerNorm as a Pallas kernel (Triton, NVIDIA GPUs).

XLA computes it in one pass, and in another sums the result over tokens, the gradient of the added
bias. Here the sums are taken while the rows are in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from maskdm_jax.model.kernels import rows

# A program computes _ROWS rows, _WARPS at a time, one per warp. At widths 512 and 768 these sizes
# take at most 1.3 % longer than the best of those in benchmarks/RESULTS.md.
_ROWS, _COLUMNS, _WARPS = 64, 256, 8
_MAX_WIDTH = 1792  # with wider rows, a thread's registers spill


def supports(width: int, dtype) -> bool:
    """Whether the kernel supports `width` channels of `dtype`."""
    fits = width % _COLUMNS == 0 and width <= _MAX_WIDTH
    return fits and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def add_normalize_gradient(
    x_MD: jax.Array,
    dx_MD: jax.Array,
    dnormed_MD: jax.Array,
    *,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of x, used both directly and through normalize(x); computed in float32.

    Args:
      x_MD: [M, D]; see `supports`.
      dx_MD: [M, D], the gradient of x from its other uses.
      dnormed_MD: [M, D], the gradient of normalize(x).
      epsilon: of LayerNorm.
      interpret: run the kernel on the CPU, slowly, for tests.

    Returns:
      The gradient [M, D] of x's dtype, and its sums over blocks of 64 rows, float32
      [ceil(M / 64), D], for the caller to add up.
    """
    num_rows, width = x_MD.shape
    num_programs = pl.cdiv(num_rows, _ROWS)
    tile = pl.BlockSpec((_ROWS, width), lambda i: (i, 0))
    return pl.pallas_call(
        functools.partial(_kernel, num_rows=num_rows, epsilon=epsilon),
        out_shape=(
            jax.ShapeDtypeStruct(x_MD.shape, x_MD.dtype),
            jax.ShapeDtypeStruct((num_programs, width), jnp.float32),
        ),
        grid=(num_programs,),
        in_specs=[tile] * 3,
        out_specs=(tile, pl.BlockSpec((None, width), lambda i: (i, 0))),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="add_normalize_gradient",
    )(x_MD, dx_MD, dnormed_MD)


def _kernel(x_ref, dx_ref, dnormed_ref, out_ref, sums_ref, *, num_rows, epsilon):
    width = x_ref.shape[1]
    first_row = pl.program_id(0) * _ROWS
    num_turns = _ROWS // _WARPS
    columns = [pl.ds(start, _COLUMNS) for start in range(0, width, _COLUMNS)]

    def rows_and_mask(i):
        mask = None
        if num_rows % _ROWS:
            mask = rows.below((_WARPS, _COLUMNS), num_rows, first_row + i * _WARPS)
        return pl.ds(i * _WARPS, _WARPS), mask

    def load(i):
        where, mask = rows_and_mask(i)
        return [
            [rows.load(ref.at[where, c], mask) for c in columns]
            for ref in (x_ref, dx_ref, dnormed_ref)
        ]

    def mean(parts):
        return jnp.sum(sum(parts[1:], parts[0]), axis=1, keepdims=True) / width

    def turn(i, carry):
        loaded, totals = carry
        # Prefetch the next rows. Loaded in their own turn, they would cost three waits.
        following = load(jnp.minimum(i + 1, num_turns - 1))
        x, dx, dnormed = ([part.astype(jnp.float32) for part in parts] for parts in loaded)
        x_mean = mean(x)
        centred = [part - x_mean for part in x]
        rstd = jax.lax.rsqrt(mean([jnp.square(part) for part in centred]) + epsilon)
        normed = [part * rstd for part in centred]
        dnormed_mean = mean(dnormed)
        projection = mean([d * n for d, n in zip(dnormed, normed, strict=True)])
        out = [
            direct + rstd * (d - dnormed_mean - n * projection)
            for direct, d, n in zip(dx, dnormed, normed, strict=True)
        ]
        where, mask = rows_and_mask(i)
        for c, part in zip(columns, out, strict=True):
            rows.store(out_ref.at[where, c], part, mask)
        return following, [total + part for total, part in zip(totals, out, strict=True)]

    totals = [jnp.zeros((_WARPS, _COLUMNS), jnp.float32) for _ in columns]
    _, totals = jax.lax.fori_loop(0, num_turns, turn, (load(0), totals))
    for c, total in zip(columns, totals, strict=True):
        sums_ref[c] = jnp.sum(total, axis=0)
