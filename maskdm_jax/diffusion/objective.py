"""The loss of both stages: denoising score matching on the given patches (arXiv 2306.11363, 3.1).

With all patches given, this is the ordinary diffusion loss. Pooled tokens of the hidden patches may
follow the visible ones. They are the averages of patches, and so are their noise, noisy values and
targets, because all of these are linear in x0 and eps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from maskdm_jax.diffusion.process import Level, Process, network_input, noised, target


def denoising_loss(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    process: Process,
    x0_BVP: jax.Array,
    eps_BVP: jax.Array,
    t_B: jax.Array,
    norm: str = "l2",
    *,
    weight: Callable[[Level], jax.Array] | None = None,
    input_eps_BVP: jax.Array | None = None,
    num_pooled: int = 0,
    pool_weight: float = 0.0,
) -> jax.Array:
    """Mean error of the network's output over the given patches of each image, float32 [B].

    With G pooled tokens after V patches, `pool_weight` G / V times their mean error is added: that
    weight is the one of a pooled value's error relative to a patch value's.

    Args:
      predict: (noisy patches [B, V, P], time_B) -> the network's output [B, V, P].
      process: the noise process.
      x0_BVP: clean patches in [-1, 1], [B, V, P].
      eps_BVP: unit normal noise [B, V, P].
      t_B: draws of `process.draw`, [B].
      norm: "l2" (mean of squares) or "l1" (mean of absolute values).
      weight: level -> the factor of each image's error [B], see `weighting`; None for 1.
      input_eps_BVP: the noise that the network's input has in place of eps, [B, V, P]; None: eps
        itself. The target is eps in any case.
      num_pooled: G; the last G tokens of x0_BVP and eps_BVP are pooled ones. The noise of an
        average of q^2 patches has standard deviation 1 / q.
      pool_weight: see above.
    """
    level = process.at(t_B)
    x_t = noised(level, x0_BVP, eps_BVP if input_eps_BVP is None else input_eps_BVP)
    error = predict(network_input(level, x_t), level.time) - target(level, x0_BVP, eps_BVP)
    error = jnp.square(error) if norm == "l2" else jnp.abs(error)
    num_visible = error.shape[1] - num_pooled
    loss_B = jnp.mean(error[:, :num_visible], axis=(1, 2))
    if num_pooled:
        share = pool_weight * num_pooled / num_visible
        loss_B += share * jnp.mean(error[:, num_visible:], axis=(1, 2))
    return loss_B if weight is None else weight(level) * loss_B
