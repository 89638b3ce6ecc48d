"""Diffusion: noise processes, the loss and samplers. Imports no other part of maskdm_jax."""

from maskdm_jax.diffusion import ddpm, edm
from maskdm_jax.diffusion.process import Process


def make_process(diffusion, image_size: tuple[int, int], normal: tuple | None = None) -> Process:
    """The noise process of `config.diffusion`, for images of `image_size` (height, width).

    `normal` stands in for `level_normal(diffusion)`; its numbers may be traced.
    """
    if diffusion.framework == "edm":
        return edm.make_process(diffusion, normal)
    return ddpm.make_process(diffusion, image_size, normal)


def level_normal(diffusion) -> tuple[float, float]:
    """Mean and standard deviation of the normal distribution that levels are drawn from.

    With DDPM it is that of ln(signal / noise), unused if draws are uniform; with EDM, of ln(sigma).
    """
    return (edm if diffusion.framework == "edm" else ddpm).level_normal(diffusion)
