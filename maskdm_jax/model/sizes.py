"""The sizes of the network and of its patch grid: plain numbers, without importing JAX."""

from typing import NamedTuple


class Dimensions(NamedTuple):
    """Width D, number of blocks, heads K."""

    width: int
    depth: int
    num_heads: int


# An even depth n builds n + 1 blocks: n/2 + 1 + n/2.
SIZES = {
    "S": Dimensions(512, 13, 8),
    "B": Dimensions(768, 13, 12),
    "L": Dimensions(1024, 21, 16),
    "H": Dimensions(1152, 29, 16),
}


def dimensions(model) -> Dimensions:
    """The dimensions of `config.model`; a field that is 0 takes the value of `model.size`."""
    size = SIZES[model.size]
    return Dimensions(
        model.width or size.width, model.depth or size.depth, model.num_heads or size.num_heads
    )


def grid_shape(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The patch grid (rows, columns) of an image of `image_size` (height, width) pixels."""
    height, width = image_size
    return height // patch_size, width // patch_size


def batch_multiple(config, num_devices: int) -> int:
    """What `train.batch_size` must be a multiple of on so many devices: each part of an
    accumulated update is split over them, and so are the coarse tokens of some of its images."""
    every = config.diffusion.coarse_every if config.model.coarse else 1
    return num_devices * config.optim.accumulate_steps * every
