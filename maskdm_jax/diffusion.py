"""The forward process: noise schedules, q(x_t | x_0), and eps / x0 / v conversions.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with abar = cumprod(1 - beta) and t = 0 .. T - 1
(Ho et al. 2020, equation 4). v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022).
Schedules are float64 NumPy, made once; what runs on the device is float32.
"""

import jax
import jax.numpy as jnp
import numpy as np


def make_betas(schedule: str, num_timesteps: int, image_size: tuple[int, int]) -> np.ndarray:
    """The noise schedule's betas, float64 [T].

    Args:
      schedule: "linear" (1e-4 .. 2e-2 at T = 1000, Ho et al. 2020), "cosine" (s = 0.008, Nichol &
        Dhariwal 2021, betas clipped to 0.999), or "shifted_cosine": the cosine's log-SNR lowered by
        2 log(size / 64), so that a larger image is noised as a 64-pixel one is (Hoogeboom et al.
        2023, equation 5); size is the geometric mean of height and width.
      num_timesteps: T.
      image_size: (height, width) in pixels; only "shifted_cosine" reads it.
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


def make_alphas_cumprod(diffusion, image_size: tuple[int, int]) -> np.ndarray:
    """abar_t of `config.diffusion`, float64 [T]."""
    return np.cumprod(1 - make_betas(diffusion.schedule, diffusion.num_timesteps, image_size))


def signal_and_noise(
    alphas_cumprod: np.ndarray, t_B: jax.Array, ndim: int
) -> tuple[jax.Array, jax.Array]:
    """sqrt(abar_t) and sqrt(1 - abar_t) of each image, float32, shaped [B, 1, ...] of rank `ndim`.

    The roots are taken in float64: at t near 0, 1 - abar_t loses its digits in float32.
    """
    shape = (-1,) + (1,) * (ndim - 1)
    signal = jnp.asarray(np.sqrt(alphas_cumprod), jnp.float32)[t_B]
    noise = jnp.asarray(np.sqrt(1 - alphas_cumprod), jnp.float32)[t_B]
    return signal.reshape(shape), noise.reshape(shape)


def q_sample(x0: jax.Array, eps: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t from x_0 and eps (any shape that `signal` and `noise` broadcast to)."""
    return signal * x0 + noise * eps


def target(prediction: str, x0: jax.Array, eps: jax.Array, signal, noise) -> jax.Array:
    """What the network is to output: eps, x0 or v."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    return signal * eps - noise * x0


def x0_coefficients(prediction: str, alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with x0 = a x_t + b output, float64 of alphas_cumprod's shape.

    Made in float64: near t = T the two terms are 1 / sqrt(abar), thousands, and nearly cancel.
    """
    signal, noise = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    if prediction == "x0":
        return np.zeros_like(signal), np.ones_like(signal)
    if prediction == "eps":
        return 1 / signal, -np.sqrt(1 / alphas_cumprod - 1)
    return signal, -noise


def eps_coefficients(prediction: str, alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with eps = a x_t + b output, float64 of alphas_cumprod's shape."""
    signal, noise = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    if prediction == "eps":
        return np.zeros_like(signal), np.ones_like(signal)
    if prediction == "x0":
        return 1 / noise, -signal / noise
    return noise, signal
