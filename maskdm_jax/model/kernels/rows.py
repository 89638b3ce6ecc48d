"""Masked reads and writes of a tile's rows, for the Triton kernels."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton


def below(shape: tuple[int, ...], num_rows: int, first_row: jax.Array | None = None) -> jax.Array:
    """Which elements of a tile have a row below `num_rows`, bool of `shape`.

    Rows are the first axis, and count from `first_row`, or from 0.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row if first_row is None else first_row + row) < num_rows


def load(ref, mask: jax.Array | None) -> jax.Array:
    """The elements of `ref`, 0 where `mask` is False; None reads all."""
    return triton.load(ref, mask=mask, other=None if mask is None else 0.0)


def store(ref, value: jax.Array, mask: jax.Array | None) -> None:
    """Writes `value` in `ref`'s dtype where `mask` is True; None writes all."""
    triton.store(ref, value.astype(ref.dtype), mask=mask)
