"""The network's output for whole images at any noise level, also where it reads coarse tokens.

`config.model.coarse` holds pairs (q, r): at levels with noise / signal above r the network reads
one token for the average of each q x q patches, so N / q^2 instead of N. Averages of noisy pixels
are noisy averages, with the same signal and q times less noise. The network predicts nothing finer
than the averages: the predicted x0 is 0 between them, where the noise hides nearly everything.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maskdm_jax.config import FieldError
from maskdm_jax.diffusion import make_process
from maskdm_jax.diffusion.process import Process
from maskdm_jax.model import patches, uvit
from maskdm_jax.model.sizes import grid_shape

_LEAST_SHARE = 1e-3  # of the levels that training draws, for tokens of one size


class Tier(NamedTuple):
    """The noise levels at which the network reads tokens of one size.

    Fields:
      size: q, patches on the side of a token; 1: patches.
      low, high: the levels have low < noise / signal <= high.
    """

    size: int
    low: float
    high: float


def tiers(config) -> list[Tier]:
    """The tiers of a config, the least noise first; one, of patches, without `model.coarse`."""
    pairs = sorted(config.model.coarse, key=lambda pair: pair[1])
    sizes, ends = [1, *(size for size, _ in pairs)], [0.0, *(ratio for _, ratio in pairs)]
    return [Tier(*each) for each in zip(sizes, ends, [*ends[1:], math.inf], strict=True)]


def validate(config) -> None:
    """Raises FieldError if `model.coarse` or `diffusion.coarse_every` cannot work."""
    grid = grid_shape(config.data.image_size, config.model.patch_size)
    process = make_process(config.diffusion, config.data.image_size)
    kept, largest, low = [], 1, 0.0
    for size, ratio in sorted(config.model.coarse, key=lambda pair: pair[1]):
        fits = size > largest and not any(side % size for side in grid)
        shares = process.share(low, ratio), process.share(ratio, math.inf)
        if fits and min(shares) >= _LEAST_SHARE:
            kept.append((size, ratio))
            largest, low = size, ratio
    if len(kept) < len(config.model.coarse):
        problem = (
            f"model.coarse is {config.model.coarse!r}; expected sizes that divide the patch grid, "
            f"{grid[0]} x {grid[1]}, and grow with the noise, each with a thousandth of the levels "
            "that training draws"
        )
        raise FieldError("model.coarse", problem, tuple(kept))
    every = config.diffusion.coarse_every
    batch = config.train.batch_size // config.optim.accumulate_steps
    if batch % every:
        good = next(n for n in range(min(every, batch), 0, -1) if batch % n == 0)
        problem = (
            f"diffusion.coarse_every is {every}; expected a divisor of {batch}, train.batch_size / "
            "optim.accumulate_steps"
        )
        raise FieldError("diffusion.coarse_every", problem, good)


def make_predict(config, mesh: Mesh, process: Process, alike: bool = False) -> Callable:
    """Makes (params, x_BNP, time_B, label_B) -> the network's output for whole images, [B, N, P].

    Args:
      config: the run's; of its mask nothing is read.
      mesh: the devices.
      process: the config's.
      alike: whether all images of a call have one level, so that the network runs once, for it.
        Otherwise it runs for each tier, and each image gets the output of its own.
    """
    model, every = uvit.make_model(config, mesh), tiers(config)
    patch_size, image_size = config.model.patch_size, config.data.image_size

    def of_tier(tier):
        def predict(params, x_BNP, time_B, label_B):
            if tier.size == 1:
                return uvit.apply(model, params, x_BNP, time_B, label_B=label_B)
            coarse_BGP = patches.average(x_BNP, patch_size, image_size, tier.size)
            output_BGP = uvit.apply(
                model, params, coarse_BGP, time_B, label_B=label_B, coarse=tier.size
            )
            # x0 is taken as 0 between the averages, so eps = x_t / noise there.
            level = process.at_time(time_B)
            factor_B = level.q / (level.noise * level.scale)
            rest_BNP = x_BNP - patches.repeat(coarse_BGP, patch_size, image_size, tier.size)
            output_BNP = patches.repeat(output_BGP, patch_size, image_size, tier.size)
            return output_BNP + jnp.broadcast_to(factor_B, time_B.shape)[:, None, None] * rest_BNP

        return predict

    branches = [of_tier(tier) for tier in every]

    def predict(params, x_BNP, time_B, label_B=None):
        given = params, x_BNP, time_B, label_B
        if len(every) == 1:
            return branches[0](*given)
        level = process.at_time(time_B)
        index_B = jnp.searchsorted(
            jnp.array([tier.low for tier in every[1:]]), level.noise / level.signal
        )
        if alike:
            return jax.lax.switch(index_B[0], branches, *given)
        outputs = jnp.stack([branch(*given) for branch in branches])
        return jnp.take_along_axis(outputs, index_B[None, :, None, None], axis=0)[0]

    return predict
