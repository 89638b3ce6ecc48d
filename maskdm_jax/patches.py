"""Images to patch tokens and back (rectangular grids too).

A patch is `patch_size` x `patch_size` pixels. Its P = patch_size * patch_size * C values are in
(row, column, channel) order, and patches are in row-major order, as in the official model's output.
"""

import einops
import jax

from maskdm_jax.model.sizes import grid_shape


def patchify(image_BHWC: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images [B, H, W, C] into patch tokens [B, N, P]; H and W are multiples of patch_size."""
    return einops.rearrange(
        image_BHWC, "b (h p1) (w p2) c -> b (h w) (p1 p2 c)", p1=patch_size, p2=patch_size
    )


def unpatchify(x_BNP: jax.Array, patch_size: int, image_size: tuple[int, int]) -> jax.Array:
    """Puts patch tokens [B, N, P] back together as images [B, H, W, C]."""
    rows, _ = grid_shape(image_size, patch_size)
    return einops.rearrange(
        x_BNP, "b (h w) (p1 p2 c) -> b (h p1) (w p2) c", h=rows, p1=patch_size, p2=patch_size
    )
