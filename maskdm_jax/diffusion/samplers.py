"""Samplers as tables of coefficients over one `lax.scan`.

One row of a table is one evaluation of the network. The new x_t is a linear combination of x_t, the
predicted x0 and eps, those of the row before, and fresh noise, whose coefficients are the columns.
A sampler depends on its levels' numbers alone, not on the framework or the prediction.

The predicted x0 is clipped, and the last row returns it. As in the official sampler of a network
that predicts eps, eps is not recomputed from the clipped x0 unless `recompute_eps`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.diffusion.process import Level, invert, to_device, x0_and_eps

_PARTS = ("x0", "eps", "x_t", "x0_before", "eps_before")
_BEFORE = {"dpm_solver": ("x0_before",), "heun": ("x0_before", "eps_before")}


def static_clip(x0: jax.Array) -> jax.Array:
    """x0 [B, ...] clipped to [-1, 1]."""
    return jnp.clip(x0, -1, 1)


def dynamic_clip(threshold: float) -> Callable[[jax.Array], jax.Array]:
    """Makes x0 [B, ...] -> x0 in [-1, 1] by dynamic thresholding (Saharia et al. 2022, 2.3).

    The quantile `threshold` of an image's |x0|, but at least 1, is the limit: x0 is clipped to it,
    then divided by it.
    """

    def clip(x0):
        flat = x0.reshape(len(x0), -1)
        limit = jnp.maximum(jnp.quantile(jnp.abs(flat), threshold, axis=1, keepdims=True), 1)
        return (jnp.clip(flat, -limit, limit) / limit).reshape(x0.shape)

    return clip


class Carry(NamedTuple):
    """What one row of a table hands to the next.

    Fields:
      x_t: [B, ...].
      before: the columns of `_PARTS` that end in "_before", of x_t's shape.
    """

    x_t: jax.Array
    before: dict[str, jax.Array]


class Stretch(NamedTuple):
    """Some of the rows of a walk.

    Fields:
      carry: of the row before; its values do not count if `first` is 0.
      first: rows done before, int32, may be traced.
      num_rows: to do; they must not go beyond the last.
    """

    carry: Carry
    first: jax.Array
    num_rows: int


def walk(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    x_T: jax.Array,
    draw_noise: Callable[[jax.Array], jax.Array],
    levels: Level,
    *,
    sampler: str = "ddim",
    eta: float = 1.0,
    stretch: Stretch | None = None,
    recompute_eps: bool = False,
    clip: Callable[[jax.Array], jax.Array] = static_clip,
    image: jax.Array | None = None,
    known: jax.Array | None = None,
) -> jax.Array:
    """Draws images from noise; call it under jit.

    Args:
      predict: (scale x_t [B, ...], time_B) -> the network's output, of x_t's shape.
      x_T: unit normal noise [B, ...]; the walk has its dtype.
      draw_noise: i -> unit normal noise of x_T's shape for step i, a traced int32 from 0. Not
        called if no step adds noise (all but "ddpm", and "ddim" with eta above 0).
      levels: the ladder of a process, or its last levels.
      sampler: "ddim" (Song et al. 2021), "ddpm" (Ho et al. 2020), "dpm_solver" (DPM-Solver++ 2M,
        Lu et al. 2022) or "heun" (Karras et al. 2022).
      eta: DDIM's noise: 0 is deterministic, 1 gives the variance of DDPM's posterior.
      stretch: the rows to do; None for all. Stretches one after another give, bit for bit, the
        images of a whole walk.
      recompute_eps: whether DDIM takes eps from x_t and the clipped x0. The other samplers depend
        on x0 alone, so this makes no difference to them.
      clip: applied to each predicted x0: `static_clip`, or one of `dynamic_clip`.
      image: clean images of x_T's shape: the walk starts from them, noised to the first level.
        None: it starts from pure noise.
      known: where `image` stays as it is, bools that broadcast to its shape; None: nowhere. The
        predicted x0 is replaced there, so x_t follows the forward process of the known values.

    Returns:
      Images of x_T's shape, in [-1, 1] unless `clip` leaves them outside; for a stretch, its
      `Carry`, of which x_t is the images after the last row.
    """
    table = coefficients(levels, sampler, eta)
    adds_noise = "noise" in table and bool(np.any(table["noise"] > 0))
    recompute_eps = recompute_eps or sampler == "heun"
    if image is None:
        # sqrt(signal^2 + noise^2) at the first level: exactly 1 for DDPM, which preserves variance.
        x_t = x_T * np.float32(np.hypot(levels.signal[0], levels.noise[0]))
    else:
        x_t = float(levels.signal[0]) * image + float(levels.noise[0]) * x_T
    levels = visited(levels, sampler)

    def denoise(x_t, at):
        time_B = jnp.full((x_t.shape[0],), at["time"])
        x0, eps = x0_and_eps(at["inverse"], x_t, predict(at["scale"] * x_t, time_B))
        x0 = clip(x0)
        if known is not None:
            x0 = jnp.where(known, image, x0)
        if recompute_eps or known is not None:
            recomputed = at["eps"][0] * x_t + at["eps"][1] * x0
            eps = recomputed if recompute_eps else jnp.where(known, recomputed, eps)
        return x0, eps

    def step(carry, at):
        x_t, before = carry
        x0, eps = denoise(x_t, at)
        parts = {"x0": x0, "eps": eps, "x_t": x_t, **before}
        x_t = sum(at["table"][name] * parts[name] for name in _PARTS if name in table)
        if adds_noise:
            x_t += at["table"]["noise"] * draw_noise(at["i"])
        return Carry(x_t, {name: parts[name.removesuffix("_before")] for name in before}), None

    carry, rows = empty_carry(x_t, sampler), to_device(_rows(levels, table), x_T.dtype)
    if stretch is None:
        return jax.lax.scan(step, carry, rows)[0].x_t
    carry = jax.tree.map(functools.partial(jnp.where, stretch.first == 0), carry, stretch.carry)
    some = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=stretch.num_rows)
    return jax.lax.scan(step, carry, jax.tree.map(lambda x: some(x, stretch.first), rows))[0]


def _rows(levels, table):
    """What each evaluation reads, by row."""
    num_rows = len(levels.signal)
    return {
        "inverse": invert(levels),
        "eps": (1 / levels.noise, -levels.signal / levels.noise),
        "scale": np.broadcast_to(levels.scale, num_rows),
        "time": levels.time,
        "table": table,
        "i": np.arange(num_rows),
    }


def empty_carry(x_t: jax.Array, sampler: str) -> Carry:
    """The carry before the first row."""
    names = _BEFORE.get(sampler, ())
    return Carry(x_t, {name: jnp.zeros_like(x_t) for name in names})


def evaluations(sampler: str, steps: int) -> int:
    """The number of network evaluations of `sampler` for one image in `steps` steps."""
    return 2 * steps - 1 if sampler == "heun" else steps


def visited(levels: Level, sampler: str) -> Level:
    """The level of each evaluation of `sampler` on these levels."""
    if sampler != "heun":
        return levels
    num_levels = len(levels.signal)
    rows = np.repeat(np.arange(num_levels), 2)[1:]
    return jax.tree.map(lambda x: np.broadcast_to(x, num_levels)[rows], levels)


def guided(
    predict_label,
    label_B: jax.Array,
    num_classes: int,
    guidance_scale: float,
    times: tuple[float, float] | None = None,
):
    """Classifier-free guidance (Ho & Salimans 2022): out_none + scale * (out_label - out_none).

    Args:
      predict_label: (x_t, time_B, label_B) -> the network's output.
      label_B: classes [B], int32.
      num_classes: the id that means "no class".
      guidance_scale: 1 is the plain conditional model, with one evaluation instead of two.
      times: the network's least and greatest time to guide at (Kynkaanniemi et al. 2024); at
        others, the plain conditional model is evaluated. None: guide at all.

    Returns:
      (x_t, time_B) -> output, for `walk`, whose images are all at one time.
    """

    def plain(x_t, time_B):
        return predict_label(x_t, time_B, label_B)

    def extrapolated(x_t, time_B):
        labels = jnp.concatenate([label_B, jnp.full_like(label_B, num_classes)])
        twice = (jnp.concatenate([x, x]) for x in (x_t, time_B))
        with_label, without = jnp.split(predict_label(*twice, labels), 2)
        return without + guidance_scale * (with_label - without)

    def within(x_t, time_B):
        is_inside = (times[0] <= time_B[0]) & (time_B[0] <= times[1])
        return jax.lax.cond(is_inside, extrapolated, plain, x_t, time_B)

    if guidance_scale == 1.0:
        return plain
    return extrapolated if times is None else within


def coefficients(levels: Level, sampler: str, eta: float = 0.0) -> dict[str, np.ndarray]:
    """The table of a sampler: {column: the coefficient in each row}."""
    if sampler == "ddim":
        return ddim(levels, eta)
    return {"ddpm": ancestral, "dpm_solver": dpm_solver, "heun": heun}[sampler](levels)


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


def dpm_solver(levels: Level) -> dict[str, np.ndarray]:
    """DPM-Solver++ 2M: x0 is linear in log(signal / noise) over two steps (Lu et al., algorithm 2).

    The first step, which has no x0 before, and the last, which is infinitely long, are DDIM's.
    """
    signal, noise, next_signal, next_noise = _steps(levels)
    with np.errstate(divide="ignore"):
        h = np.log(next_signal / next_noise) - np.log(signal / noise)
    extrapolated = np.zeros_like(h)
    extrapolated[1:-1] = h[1:-1] / (2 * h[:-2])
    weight = -next_signal * np.expm1(-h)
    return {
        "x_t": next_noise / noise,
        "x0": weight * (1 + extrapolated),
        "x0_before": -weight * extrapolated,
    }


def heun(levels: Level) -> dict[str, np.ndarray]:
    """Heun's method on d(x / signal) / d(noise / signal) = eps (Karras et al., algorithm 1).

    Rows alternate: DDIM's step to the next level; from the eps there, the same step again with the
    mean of both slopes. The last step, to the clean image, is DDIM's alone.
    """
    signal, noise, next_signal, next_noise = _steps(levels)
    half = (next_noise - next_signal * noise / signal) / 2
    zero = np.zeros_like(half)

    def rows(first, second):
        return np.stack([first, second], 1).ravel()[:-1]

    return {
        "x0": rows(next_signal, zero),
        "eps": rows(next_noise, half),
        "x0_before": rows(zero, next_signal),
        # x / signal = x0 + noise / signal eps at the level before
        "eps_before": rows(zero, next_signal * noise / signal + half),
    }


def _steps(levels):
    """signal and noise before and after each step; the last step ends at the clean image."""
    signal, noise = np.append(levels.signal, 1.0), np.append(levels.noise, 0.0)
    return signal[:-1], noise[:-1], signal[1:], noise[1:]


def _posterior_std(signal, noise, next_signal, next_noise):
    added = noise**2 - (signal / next_signal * next_noise) ** 2
    return next_noise / noise * np.sqrt(np.maximum(added, 0))
