"""The loss of both stages: denoising score matching on the visible patches (arXiv 2306.11363, 3.1).

Patchify, gather the visible patches, draw noise for those only, predict, compare. With nothing
hidden it is the ordinary diffusion loss.
"""

import jax
import jax.numpy as jnp

from maskdm_jax import diffusion, uvit


def denoising_loss(
    model: uvit.UViT,
    params: dict,
    x0_BVP: jax.Array,
    eps_BVP: jax.Array,
    t_B: jax.Array,
    alphas_cumprod,
    *,
    prediction: str = "eps",
    norm: str = "l2",
    visible_BV: jax.Array | None = None,
    label_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Mean error of the network's prediction over the given patches; a float32 scalar.

    Args:
      model, params: the network.
      x0_BVP: clean patches in [-1, 1], [B, V, P]: the visible ones, or all of them.
      eps_BVP: unit normal noise [B, V, P].
      t_B: timesteps [B], int32.
      alphas_cumprod: float64 NumPy [T].
      prediction: "eps", "x0" or "v".
      norm: "l2" (mean of squares) or "l1" (mean of absolute values).
      visible_BV: ids of the given patches [B, V]; None where all are given.
      label_B: classes [B], or None.
      dropout_key: see `uvit.apply`.
    """
    signal, noise = diffusion.signal_and_noise(alphas_cumprod, t_B, x0_BVP.ndim)
    x_t = diffusion.q_sample(x0_BVP, eps_BVP, signal, noise)
    output = uvit.apply(
        model, params, x_t, t_B, visible_BV=visible_BV, label_B=label_B, dropout_key=dropout_key
    )
    error = output - diffusion.target(prediction, x0_BVP, eps_BVP, signal, noise)
    return jnp.mean(jnp.square(error) if norm == "l2" else jnp.abs(error))


def gather_visible(x_BNP: jax.Array, visible_BV: jax.Array | None) -> jax.Array:
    """The visible patches [B, V, P] of [B, N, P]; all of them where `visible_BV` is None."""
    if visible_BV is None:
        return x_BNP
    return jnp.take_along_axis(x_BNP, visible_BV[:, :, None], axis=1)
