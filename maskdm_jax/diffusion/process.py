"""A noise process as numbers: its levels, how training draws them, which ones samplers visit.

At a level, x_t = signal x0 + noise eps. The network reads (scale x_t, time), and is trained to
output p x0 + q eps: eps, x0 and v are (p, q) = (0, 1), (1, 0) and (-noise, signal). The loss and
the samplers depend on nothing else of a framework.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Level(NamedTuple):
    """A noise level for each image or step: arrays of one shape, or floats for constants.

    `time` is the input of the network's sinusoids.
    """

    signal: Any
    noise: Any
    p: Any
    q: Any
    scale: Any
    time: Any


class Process(NamedTuple):
    """A diffusion framework.

    Fields:
      draw: (key, batch, low, high) -> t_B, the training draw for each image: timesteps for DDPM,
        sigmas for EDM. Only levels with low < noise / signal <= high are drawn.
      share: (low, high) -> the probability of such a level, were all drawn: a float, or a float32
        scalar if the process was made from traced numbers.
      at: t_B -> the Level of each t, float32, under jit.
      at_time: time_B -> the Level of each input of the network's sinusoids, float32, under jit.
      ladder: (steps, spacing) -> the Level of each sampler step, noisiest first, float64 NumPy
        [steps]. The clean image follows the last. `spacing` is "timestep", the framework's own
        (even in t for DDPM, Karras's for EDM), or a spacing of `spaced`.
    """

    draw: Callable[..., jax.Array]
    share: Callable[[float, float], float | jax.Array]
    at: Callable[[jax.Array], Level]
    at_time: Callable[[jax.Array], Level]
    ladder: Callable[[int, str], Level]


class Inverse(NamedTuple):
    """Coefficients of x0 and eps: a pair (on x_t, on the network's output) for each."""

    x0: tuple[Any, Any]
    eps: tuple[Any, Any]


def invert(level: Level) -> Inverse:
    """Solves x_t = signal x0 + noise eps, output = p x0 + q eps for x0 and eps.

    Samplers need the float64 of a NumPy Level: near pure noise the two terms of x0 are thousands
    and nearly cancel.
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
    """The training target p x0 + q eps of each image, [B, ...], at the levels [B]."""
    level = _per_image(level, x0.ndim)
    terms = ((level.p, x0), (level.q, eps))
    # A term whose coefficient is the float 0 is not computed.
    return sum(c * x for c, x in terms if not (isinstance(c, float) and c == 0))


def network_input(level: Level, x_t: jax.Array) -> jax.Array:
    """The network's input scale x_t for each image, [B, ...], at the levels [B]."""
    return _per_image(level, x_t.ndim).scale * x_t


def x0_and_eps(inverse: Inverse, x_t: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x0, eps) from x_t and the network's output, of their shape."""
    x0 = inverse.x0[0] * x_t + inverse.x0[1] * output
    eps = inverse.eps[0] * x_t + inverse.eps[1] * output
    return x0, eps


def spaced(spacing: str, noisiest: float, cleanest: float, steps: int) -> np.ndarray:
    """log(signal / noise) of each sampler step between two ends, float64 [steps], ascending.

    "log_snr" spaces it evenly (Lu et al. 2022), and "karras" (noise / signal)^(1 / 7) (Karras et
    al. 2022, equation 5).
    """
    if spacing == "karras":
        return -7 * np.log(np.linspace(np.exp(-noisiest / 7), np.exp(-cleanest / 7), steps))
    return np.linspace(noisiest, cleanest, steps)


def draw_normal(key, batch: int, mean, std, low=-math.inf, high=math.inf):
    """Draws from N(mean, std^2) within the bounds, float32 [batch]; mean and std may be traced."""
    if (low, high) == (-math.inf, math.inf):
        return mean + std * jax.random.normal(key, (batch,))
    # Unbounded draws reach 5.4 in float32; an infinite bound gives some that are infinite.
    low, high = (jnp.clip((x - mean) / jnp.maximum(std, 1e-6), -5.4, 5.4) for x in (low, high))
    return mean + std * jax.random.truncated_normal(key, low, high, (batch,))


def normal_share(mean, std, low: float, high: float):
    """The probability that a draw from N(mean, std^2) lies within the bounds.

    Returns a Python float, computed without JAX, or a float32 scalar if `mean` is a JAX array.
    """
    is_traced = isinstance(mean, jax.Array)
    erf, xp = (jax.scipy.special.erf, jnp) if is_traced else (math.erf, np)
    low, high = ((bound - mean) / xp.maximum(std, 1e-6) for bound in (low, high))
    return (erf(high / math.sqrt(2)) - erf(low / math.sqrt(2))) / 2


def to_device(tree, dtype=jnp.float32):
    """Converts NumPy leaves to JAX arrays: floats to `dtype`, integers to int32."""

    def convert(x):
        return jnp.asarray(x, jnp.int32 if np.issubdtype(x.dtype, np.integer) else dtype)

    return jax.tree.map(convert, tree)


def _per_image(level, ndim):
    shape = (-1, *[1] * (ndim - 1))
    return jax.tree.map(lambda x: x if isinstance(x, float) else x.reshape(shape), level)
