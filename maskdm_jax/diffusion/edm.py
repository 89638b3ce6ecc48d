"""EDM: the continuous process of Karras et al. 2022 (arXiv 2206.00364), x_t = x0 + sigma eps.

Its denoiser is D(x_t) = c_skip x_t + c_out F(c_in x_t, c_noise), where F is the network and, with
s = sigma_data and r = sqrt(sigma^2 + s^2) (table 1 there),

    c_skip = s^2 / r^2,  c_out = sigma s / r,  c_in = 1 / r,  c_noise = ln(sigma) / 4.

D is right if F outputs (x0 - c_skip x_t) / c_out = sigma / (s r) x0 - s / r eps, which gives p and
q. The paper's weight of D's squared error is 1 / c_out^2, so its weighted loss is the plain mean
square of F's error, which `objective` computes for every process.

The network's sinusoids were made for timesteps of 0 .. 999. c_noise spans only -1.6 .. 1.1, in
which most of them are constant. The network's time is therefore 400 c_noise = 100 ln(sigma), which
spans -621 .. 438.
"""

import math

import jax.numpy as jnp
import numpy as np

from maskdm_jax.diffusion.process import Level, Process, draw_normal, normal_share

_TIME_PER_LOG_SIGMA = 100.0


def level_normal(diffusion) -> tuple[float, float]:
    """Mean and standard deviation of ln(sigma)."""
    return diffusion.edm_mean, diffusion.edm_std


def make_process(diffusion, normal: tuple | None = None) -> Process:
    """The process of `config.diffusion`; its t is sigma, float32.

    Training draws ln(sigma) from N(edm_mean, edm_std^2), the paper's P_mean and P_std, or from
    `normal`. A ladder goes from sigma_max to sigma_min: evenly in sigma^(1 / rho) (equation 5
    there), or with "log_snr" in ln(sigma).
    """
    data_std = diffusion.sigma_data
    mean, std = normal or level_normal(diffusion)

    def bounds(low, high):  # of ln(sigma)
        return (math.log(x) if x else -math.inf for x in (low, high))

    def draw(key, batch, low=0.0, high=math.inf):
        return jnp.exp(draw_normal(key, batch, mean, std, *bounds(low, high)))

    def share(low, high):
        return normal_share(mean, std, *bounds(low, high))

    def at(sigma):
        xp = np if isinstance(sigma, np.ndarray) else jnp
        r = xp.sqrt(sigma**2 + data_std**2)
        return Level(
            signal=xp.ones_like(sigma),
            noise=sigma,
            p=sigma / (data_std * r),
            q=-data_std / r,
            scale=1 / r,
            time=_TIME_PER_LOG_SIGMA * xp.log(sigma),
        )

    def ladder(steps, spacing):
        high, low, rho = diffusion.sigma_max, diffusion.sigma_min, diffusion.rho
        if spacing == "log_snr":
            return at(np.geomspace(high, low, steps))
        return at(np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho)

    def at_time(time):
        return at(jnp.exp(time / _TIME_PER_LOG_SIGMA))

    return Process(draw, share, at, at_time, ladder)
