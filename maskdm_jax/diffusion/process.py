"""A noise process, reduced to numbers: its levels, how training draws them, how samplers walk them.

At a level, x_t = signal x0 + noise eps. The network reads (scale x_t, time), and is trained to
output p x0 + q eps: eps, x0 and v are (p, q) = (0, 1), (1, 0) and (-noise, signal). The loss and
the samplers know nothing else of a framework.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Level(NamedTuple):
    """A noise level for each image or step: arrays of one shape, or numbers for what is constant.

    `time` is what the network's sinusoids see.
    """

    signal: Any
    noise: Any
    p: Any
    q: Any
    scale: Any
    time: Any


class Process(NamedTuple):
    """A framework.

    Fields:
      draw: (key, batch) -> t_B: what training draws for each image.
      at: t -> the Level of each t, float32, under jit.
      ladder: (steps, spacing) -> the Levels that a sampler visits, noisiest first, float64 NumPy
        [steps]. The clean image comes after the last. `spacing` is "timestep", even in t, or
        "log_snr", even in log(signal / noise).
    """

    draw: Callable[[jax.Array, int], jax.Array]
    at: Callable[[jax.Array], Level]
    ladder: Callable[[int, str], Level]


class Inverse(NamedTuple):
    """What turns x_t and the network's output into x0 and eps: (of x_t, of the output) each."""

    x0: tuple[Any, Any]
    eps: tuple[Any, Any]


def invert(level: Level) -> Inverse:
    """Solves x_t = signal x0 + noise eps, output = p x0 + q eps for x0 and eps.

    In NumPy it is float64, which samplers need: near pure noise the two terms of x0 are
    thousands, and nearly cancel.
    """
    determinant = level.signal * level.q - level.noise * level.p
    return Inverse(
        x0=(level.q / determinant, -level.noise / determinant),
        eps=(-level.p / determinant, level.signal / determinant),
    )


def noised(level: Level, x0: jax.Array, eps: jax.Array) -> jax.Array:
    """x_t of each image, [B, ...], at the levels [B]."""
    level = _per_image(level, x0.ndim)
    return level.signal * x0 + level.noise * eps


def target(level: Level, x0: jax.Array, eps: jax.Array) -> jax.Array:
    """What the network is trained to output for each image, [B, ...], at the levels [B]."""
    level = _per_image(level, x0.ndim)
    terms = ((level.p, x0), (level.q, eps))
    # A coefficient that is the number 0 costs no look at its term.
    return sum(c * x for c, x in terms if not (isinstance(c, float) and c == 0))


def network_input(level: Level, x_t: jax.Array) -> jax.Array:
    """What the network reads, of each image [B, ...], at the levels [B]."""
    return _per_image(level, x_t.ndim).scale * x_t


def x0_and_eps(inverse: Inverse, x_t: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x0 and eps from what the network was given and what it returned."""
    x0 = inverse.x0[0] * x_t + inverse.x0[1] * output
    eps = inverse.eps[0] * x_t + inverse.eps[1] * output
    return x0, eps


def to_device(tree):
    """NumPy leaves as float32 arrays, integers as int32."""

    def convert(x):
        return jnp.asarray(x, jnp.int32 if np.issubdtype(x.dtype, np.integer) else jnp.float32)

    return jax.tree.map(convert, tree)


def _per_image(level, ndim):
    shape = (-1, *[1] * (ndim - 1))
    return jax.tree.map(lambda x: x if isinstance(x, float) else x.reshape(shape), level)
