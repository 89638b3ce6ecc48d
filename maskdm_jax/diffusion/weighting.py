"""How much each noise level counts in the loss.

A weighting is defined on the squared error of x0, so it means the same for every prediction and
every process. An error of the network's output is an error of x0, times the coefficient of the
output in `process.invert`; its square converts the weight.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from maskdm_jax.diffusion.process import Level, invert


def loss_weight(diffusion) -> Callable[[Level], jax.Array] | None:
    """The weight of `diffusion.loss_weight`, a function of the Level; None for "uniform".

    With snr = (signal / noise)^2, g = `min_snr_gamma` and b = `sigmoid_bias`, the squared error of
    the network's output is multiplied by:

        prediction   "min_snr"                "sigmoid"
        x0           min(snr, g)              snr sigmoid(b - ln snr) = e^b sigmoid(ln snr - b)
        eps          min(snr, g) / snr        sigmoid(b - ln snr)
        v            min(snr, g) / (snr + 1)  sigmoid(b - ln snr) snr / (snr + 1)

    and for EDM's output by c_out^2 times the row of x0.

    "min_snr" is Hang et al. 2023. "sigmoid" is the w of Kingma & Gao 2023 with the bias of
    Hoogeboom et al. 2024 (SiD2). Those two papers also divide by the density with which levels are
    drawn; here `diffusion.draw` and the schedule keep their effect.

    Returns:
      None, or level -> float32 [B], for a Level of arrays [B].
    """
    if diffusion.loss_weight == "uniform":
        return None

    def weight(level):
        snr = jnp.square(level.signal / level.noise)
        if diffusion.loss_weight == "min_snr":
            of_x0 = jnp.minimum(snr, diffusion.min_snr_gamma)
        else:
            of_x0 = snr * jax.nn.sigmoid(diffusion.sigmoid_bias - jnp.log(snr))
        return of_x0 * jnp.square(invert(level).x0[1])

    return weight
