"""Samplers: ancestral DDPM (Ho et al. 2020) and DDIM (Song et al. 2021), each one `lax.scan`.

Both walk the same timesteps, linspace(-1, T - 1, steps + 1) truncated to int and reversed, and clip
the predicted x0 to [-1, 1]. The last step returns that x0. DDIM keeps the eps that the network
predicted, as the official sampler does, and does not recompute it from the clipped x0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax import diffusion


def timesteps(num_timesteps: int, steps: int) -> np.ndarray:
    """The walk from noise to image: int32 [steps + 1], T - 1 first and -1 last."""
    return np.linspace(-1, num_timesteps - 1, steps + 1).astype(np.int32)[::-1]


def sample(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    x_T: jax.Array,
    draw_noise: Callable[[jax.Array], jax.Array],
    alphas_cumprod: np.ndarray,
    *,
    sampler: str = "ddim",
    steps: int = 250,
    eta: float = 1.0,
    prediction: str = "eps",
) -> jax.Array:
    """Draws images from noise; call it under jit.

    Args:
      predict: (x_t [B, ...], t_B [B] int32) -> the network's output, of x_t's shape.
      x_T: unit normal noise [B, ...], float32.
      draw_noise: (i) -> unit normal noise of x_T's shape for step i, a traced int32 in
        0 .. steps - 1. Not called where no step adds noise (DDIM with eta 0).
      alphas_cumprod: float64 [T].
      sampler: "ddim" or "ddpm".
      steps: network evaluations, 1 .. T.
      eta: DDIM's noise level: 0 is deterministic, 1 has the variance of DDPM's posterior.
      prediction: what the network outputs: "eps", "x0" or "v".

    Returns:
      float32 images in [-1, 1] of x_T's shape.
    """
    times = timesteps(len(alphas_cumprod), steps)
    # Index -1 is the clean image: abar = 1.
    abar = np.append(alphas_cumprod, 1.0)[times]
    coefficients = _ddim(abar, eta) if sampler == "ddim" else _ddpm(abar)
    adds_noise = bool(np.any(coefficients["sigma"] > 0))
    steps_xs = {
        "i": np.arange(steps, dtype=np.int32),
        "t": times[:-1],
        "to_x0": diffusion.x0_coefficients(prediction, abar[:-1]),
        "to_eps": diffusion.eps_coefficients(prediction, abar[:-1]),
        **coefficients,
    }

    def step(x_t, at):
        t_B = jnp.full((x_t.shape[0],), at["t"], jnp.int32)
        output = predict(x_t, t_B)
        x0 = jnp.clip(at["to_x0"][0] * x_t + at["to_x0"][1] * output, -1, 1)
        eps = at["to_eps"][0] * x_t + at["to_eps"][1] * output
        x_t = at["x0"] * x0 + at["eps"] * eps + at["x_t"] * x_t
        if adds_noise:
            x_t += at["sigma"] * draw_noise(at["i"])
        return x_t, None

    def to_device(x):
        return jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.float32)

    images, _ = jax.lax.scan(step, x_T, jax.tree.map(to_device, steps_xs))
    return images


def guided(predict_label, label_B: jax.Array, num_classes: int, guidance_scale: float):
    """Classifier-free guidance (Ho & Salimans 2022): out_none + scale * (out_label - out_none).

    Args:
      predict_label: (x_t, t_B, label_B) -> the network's output.
      label_B: classes [B], int32.
      num_classes: the id that means "no class".
      guidance_scale: 1 is the plain conditional model, and costs one evaluation instead of two.

    Returns:
      (x_t, t_B) -> output, for `sample`.
    """
    if guidance_scale == 1.0:
        return lambda x_t, t_B: predict_label(x_t, t_B, label_B)

    def predict(x_t, t_B):
        labels = jnp.concatenate([label_B, jnp.full_like(label_B, num_classes)])
        both = predict_label(jnp.concatenate([x_t, x_t]), jnp.concatenate([t_B, t_B]), labels)
        with_label, without = jnp.split(both, 2)
        return without + guidance_scale * (with_label - without)

    return predict


def _ddim(abar, eta):
    """x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) eps + sigma z (Song et al., eq. 12)."""
    # float32 arithmetic, as in the official code: at eta 1 the first step's 1 - abar - sigma^2
    # nearly cancels, and what rounding leaves of it shows in the image at 1e-4.
    abar = abar.astype(np.float32)
    now, then = abar[:-1], abar[1:]
    sigma = np.float32(eta) * np.sqrt((1 - now / then) * (1 - then) / (1 - now))
    return {
        "x0": np.sqrt(then),
        "eps": np.sqrt(np.maximum(1 - then - sigma**2, 0)),
        "x_t": np.zeros_like(then),
        "sigma": sigma,
    }


def _ddpm(abar):
    """The posterior q(x_s | x_t, x0) (Ho et al., eq. 6-7), for s = t - 1 or a longer stride."""
    now, then = abar[:-1], abar[1:]
    alpha = now / then
    return {
        "x0": np.sqrt(then) * (1 - alpha) / (1 - now),
        "eps": np.zeros_like(then),
        "x_t": np.sqrt(alpha) * (1 - then) / (1 - now),
        "sigma": np.sqrt((1 - alpha) * (1 - then) / (1 - now)),
    }
