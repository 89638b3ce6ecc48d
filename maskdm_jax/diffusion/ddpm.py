"""DDPM: the discrete, variance-preserving process of Ho et al. 2020, and its noise schedules.

signal = sqrt(abar_t), noise = sqrt(1 - abar_t), abar = cumprod(1 - beta), t = 0 .. T - 1 (equation
4 there). v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022). Schedules are computed
once in float64 NumPy; the device computes in float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.diffusion.process import (
    Level,
    Process,
    draw_normal,
    normal_share,
    spaced,
    to_device,
)

# log(signal / noise) at which "log_snr" and "karras" ladders begin at the earliest, as in Lu et al.
# 2022. The cosine schedule ends at -9.9: a third of an even walk would see nothing but noise.
_NOISIEST = -5.1


def level_normal(diffusion) -> tuple[float, float]:
    """Mean and standard deviation of ln(signal / noise) where `diffusion.draw` is not uniform."""
    return diffusion.draw_mean, diffusion.draw_std


def make_process(diffusion, image_size: tuple[int, int], normal: tuple | None = None) -> Process:
    """The process of `config.diffusion`: its schedule, num_timesteps, prediction and draw.

    Training draws t uniformly, or "logit_normal": the t whose ln(signal / noise) is nearest to a
    draw of N(draw_mean, draw_std^2) (Esser et al. 2024; Li & He 2025), so draws beyond the
    schedule's ends give the first or the last t. `normal`, if given, replaces
    (draw_mean, draw_std).

    The network's time is t, int32; in a "log_snr" or "karras" ladder it is real-valued, float64,
    with log(signal / noise) interpolated between timesteps, from at least -5.1 on.
    """
    alphas_cumprod = make_alphas_cumprod(diffusion, image_size)
    signal, noise = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    num_timesteps = len(alphas_cumprod)

    def level(signal, noise, time):
        p, q = _output(diffusion.prediction, signal, noise)
        return Level(signal, noise, p, q, scale=1.0, time=time)

    log_snr = np.log(signal / noise)  # falls with t

    def timesteps_of(low, high):  # the first, and the one after the last
        return (int(np.searchsorted(noise / signal, x, side="right")) for x in (low, high))

    def bounds(low, high):  # of ln(signal / noise)
        return (-math.log(x) if x else math.inf for x in (high, low))

    def draw(key, batch, low=0.0, high=math.inf):
        first, end = timesteps_of(low, high)
        if diffusion.draw == "uniform":
            return jax.random.randint(key, (batch,), first, end)
        between = to_device((log_snr[1:] + log_snr[:-1]) / 2)
        mean, std = normal or level_normal(diffusion)
        drawn = draw_normal(key, batch, mean, std, *bounds(low, high))
        return jnp.clip(jnp.searchsorted(-between, -drawn).astype(jnp.int32), first, end - 1)

    def share(low, high):
        first, end = timesteps_of(low, high)
        if diffusion.draw == "uniform" or first == end:
            return (end - first) / num_timesteps
        return normal_share(*(normal or level_normal(diffusion)), *bounds(low, high))

    def at(t_B):
        # Tables of the float64 square roots: near t = 0, 1 - abar_t has few digits in float32.
        return level(*(to_device(table)[t_B] for table in (signal, noise)), time=t_B)

    def at_time(time):
        table = to_device(log_snr)
        ratio = jnp.interp(
            time.astype(jnp.float32), jnp.arange(num_timesteps, dtype=jnp.float32), table
        )
        return level((1 + jnp.exp(-2 * ratio)) ** -0.5, (1 + jnp.exp(2 * ratio)) ** -0.5, time=time)

    def ladder(steps, spacing):
        if spacing == "timestep":
            t = timesteps(num_timesteps, steps)[:-1]
            return level(signal[t], noise[t], time=t)
        walk = spaced(spacing, max(log_snr[-1], _NOISIEST), log_snr[0], steps)
        t = np.interp(walk, log_snr[::-1], np.arange(num_timesteps)[::-1])
        return level((1 + np.exp(-2 * walk)) ** -0.5, (1 + np.exp(2 * walk)) ** -0.5, time=t)

    return Process(draw, share, at, at_time, ladder)


def make_alphas_cumprod(diffusion, image_size: tuple[int, int]) -> np.ndarray:
    """abar_t of `config.diffusion`, float64 [T]."""
    return np.cumprod(1 - make_betas(diffusion.schedule, diffusion.num_timesteps, image_size))


def make_betas(schedule: str, num_timesteps: int, image_size: tuple[int, int]) -> np.ndarray:
    """The betas of a noise schedule, float64 [T].

    Args:
      schedule: "linear" (1e-4 .. 2e-2 at T = 1000, Ho et al. 2020), "cosine" (s = 0.008, Nichol &
        Dhariwal 2021, betas clipped to 0.999), or "shifted_cosine": the cosine with its log-SNR
        lowered by 2 log(size / 64), which noises a larger image as much as the cosine noises one
        of 64 pixels (Hoogeboom et al. 2023, equation 5); size is the geometric mean of height and
        width.
      num_timesteps: T.
      image_size: (height, width) in pixels; only "shifted_cosine" uses it.

    Raises:
      ValueError: for an unknown schedule.
    """
    if schedule == "linear":
        # The range is defined at T = 1000; another T keeps the same total noise.
        scale = 1000 / num_timesteps
        return np.linspace(scale * 1e-4, scale * 2e-2, num_timesteps)
    time = np.arange(num_timesteps + 1) / num_timesteps
    abar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    if schedule == "shifted_cosine":
        shift = np.log(64**2 / (image_size[0] * image_size[1]))
        abar = abar * np.exp(shift) / (abar * np.exp(shift) + 1 - abar)
    elif schedule != "cosine":
        raise ValueError(f"unknown noise schedule {schedule!r}")
    return np.clip(1 - abar[1:] / abar[:-1], 0, 0.999)


def schedule_of(betas: np.ndarray, diffusion, image_size: tuple[int, int]) -> str:
    """The name of the schedule with these betas, to float32 precision, or "unknown".

    Several may have them: the shifted cosine is the cosine at 64x64. That of `config.diffusion`
    comes first.
    """
    for schedule in (diffusion.schedule, "linear", "cosine", "shifted_cosine"):
        if np.allclose(betas, make_betas(schedule, len(betas), image_size), rtol=1e-4, atol=1e-8):
            return schedule
    return "unknown"


def timesteps(num_timesteps: int, steps: int) -> np.ndarray:
    """The official code's timesteps, from T - 1 (noise) to -1 (image), int32 [steps + 1]."""
    return np.linspace(-1, num_timesteps - 1, steps + 1).astype(np.int32)[::-1]


def _output(prediction, signal, noise):
    """(p, q) of the network's output p x0 + q eps."""
    return {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-noise, signal)}[prediction]
