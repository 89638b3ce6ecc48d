"""The mathematics of noise: processes, the loss, and samplers. Imports nothing else of ours."""

from maskdm_jax.diffusion import ddpm
from maskdm_jax.diffusion.process import Process


def make_process(diffusion, image_size: tuple[int, int]) -> Process:
    """The noise process of `config.diffusion`, for images of `image_size` (height, width)."""
    return ddpm.make_process(diffusion, image_size)
