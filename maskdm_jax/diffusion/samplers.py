"""Samplers as tables of coefficients over one `lax.scan`: DDIM and ancestral DDPM.

One step is a linear combination of x_t, the predicted x0, the predicted eps and fresh noise, whose
coefficients are the columns of a table. The predicted x0 is clipped to [-1, 1], and the last step
returns it. As in the official sampler, eps is not recomputed from the clipped x0.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.diffusion.process import Level, invert, to_device, x0_and_eps

_PARTS = ("x0", "eps", "x_t")


class Stretch(NamedTuple):
    """Some of the steps of a walk.

    Fields:
      x: the array between two steps [B, ...], float32; its values do not count if `first` is 0.
      first: steps done before, int32, may be traced.
      num_steps: to do; they must not go beyond the last.
    """

    x: jax.Array
    first: jax.Array
    num_steps: int


def walk(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    x_T: jax.Array,
    draw_noise: Callable[[jax.Array], jax.Array],
    levels: Level,
    *,
    sampler: str = "ddim",
    eta: float = 1.0,
    stretch: Stretch | None = None,
) -> jax.Array:
    """Draws images from noise; call it under jit.

    Args:
      predict: (scale x_t [B, ...], time_B) -> the network's output, of x_t's shape.
      x_T: unit normal noise [B, ...], float32.
      draw_noise: i -> unit normal noise of x_T's shape for step i, a traced int32 from 0. Not
        called if no step adds noise (DDIM with eta 0).
      levels: the ladder of a process.
      sampler: "ddim" (Song et al. 2021) or "ddpm" (Ho et al. 2020).
      eta: DDIM's noise: 0 is deterministic, 1 gives the variance of DDPM's posterior.
      stretch: the steps to take; None for all. Stretches one after another give, bit for bit, the
        images of a whole walk.

    Returns:
      float32 images in [-1, 1] of x_T's shape; before the last step the array between two steps.
    """
    table = ancestral(levels) if sampler == "ddpm" else ddim(levels, eta)
    adds_noise = bool(np.any(table["noise"] > 0))
    num_steps = len(levels.signal)
    # sqrt(signal^2 + noise^2) at the first level: exactly 1 for DDPM, which preserves variance.
    x_T = x_T * np.float32(np.hypot(levels.signal[0], levels.noise[0]))

    def step(x_t, at):
        inverse, column, i = at["inverse"], at["table"], at["i"]
        time_B = jnp.full((x_t.shape[0],), at["time"])
        x0, eps = x0_and_eps(inverse, x_t, predict(at["scale"] * x_t, time_B))
        parts = {"x0": jnp.clip(x0, -1, 1), "eps": eps, "x_t": x_t}
        x_t = sum(column[name] * parts[name] for name in _PARTS if name in column)
        if adds_noise:
            x_t += column["noise"] * draw_noise(i)
        return x_t, None

    steps = {
        "inverse": invert(levels),
        "scale": np.broadcast_to(levels.scale, num_steps),
        "time": levels.time,
        "table": table,
        "i": np.arange(num_steps),
    }
    x, steps = x_T, to_device(steps)
    if stretch is not None:
        x = jnp.where(stretch.first == 0, x_T, stretch.x)
        some = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=stretch.num_steps)
        steps = jax.tree.map(lambda column: some(column, stretch.first), steps)
    images, _ = jax.lax.scan(step, x, steps)
    return images


def evaluations(sampler: str, steps: int) -> int:
    """The number of network evaluations of `sampler` for one image in `steps` steps."""
    del sampler  # every table takes one evaluation per step
    return steps


def guided(predict_label, label_B: jax.Array, num_classes: int, guidance_scale: float):
    """Classifier-free guidance (Ho & Salimans 2022): out_none + scale * (out_label - out_none).

    Args:
      predict_label: (x_t, time_B, label_B) -> the network's output.
      label_B: classes [B], int32.
      num_classes: the id that means "no class".
      guidance_scale: 1 is the plain conditional model, with one evaluation instead of two.

    Returns:
      (x_t, time_B) -> output, for `walk`.
    """
    if guidance_scale == 1.0:
        return lambda x_t, time_B: predict_label(x_t, time_B, label_B)

    def predict(x_t, time_B):
        labels = jnp.concatenate([label_B, jnp.full_like(label_B, num_classes)])
        twice = (jnp.concatenate([x, x]) for x in (x_t, time_B))
        with_label, without = jnp.split(predict_label(*twice, labels), 2)
        return without + guidance_scale * (with_label - without)

    return predict


def ddim(levels: Level, eta: float) -> dict[str, np.ndarray]:
    """x_s = signal_s x0 + sqrt(noise_s^2 - sigma^2) eps + sigma z (Song et al., equation 12)."""
    # float32 arithmetic, as in the official code: at eta 1 the first step's noise_s^2 - sigma^2
    # nearly cancels, and its rounding error changes the image by 1e-4.
    signal, noise, next_signal, next_noise = (x.astype(np.float32) for x in _steps(levels))
    sigma = np.float32(eta) * _posterior_std(signal, noise, next_signal, next_noise)
    return {
        "x0": next_signal,
        "eps": np.sqrt(np.maximum(next_noise**2 - sigma**2, 0)),
        "noise": sigma,
    }


def ancestral(levels: Level) -> dict[str, np.ndarray]:
    """The posterior q(x_s | x_t, x0) (Ho et al., equations 6 and 7), for strides of any length."""
    signal, noise, next_signal, next_noise = _steps(levels)
    alpha = (signal / next_signal) ** 2
    return {
        "x0": next_signal * (noise**2 - alpha * next_noise**2) / noise**2,
        "x_t": np.sqrt(alpha) * next_noise**2 / noise**2,
        "noise": _posterior_std(signal, noise, next_signal, next_noise),
    }


def _steps(levels):
    """signal and noise before and after each step; the last step ends at the clean image."""
    signal, noise = np.append(levels.signal, 1.0), np.append(levels.noise, 0.0)
    return signal[:-1], noise[:-1], signal[1:], noise[1:]


def _posterior_std(signal, noise, next_signal, next_noise):
    added = noise**2 - (signal / next_signal * next_noise) ** 2
    return next_noise / noise * np.sqrt(np.maximum(added, 0))
