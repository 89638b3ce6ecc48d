"""Diffusion: noise processes, the loss and samplers. Imports no other part of maskdm_jax."""

from maskdm_jax.diffusion import ddpm, edm
from maskdm_jax.diffusion.process import Process


def make_process(diffusion, image_size: tuple[int, int]) -> Process:
    """The noise process of `config.diffusion`, for images of `image_size` (height, width)."""
    if diffusion.framework == "edm":
        return edm.make_process(diffusion)
    return ddpm.make_process(diffusion, image_size)
