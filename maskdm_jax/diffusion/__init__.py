"""Diffusion: noise processes, the loss and samplers. Imports no other part of maskdm_jax."""

from maskdm_jax.diffusion import ddpm
from maskdm_jax.diffusion.process import Process


def make_process(diffusion, image_size: tuple[int, int]) -> Process:
    """The noise process of `config.diffusion`, for images of `image_size` (height, width)."""
    return ddpm.make_process(diffusion, image_size)
