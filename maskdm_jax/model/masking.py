"""Which patches are visible: patch, block and crop masks (section 3 of arXiv 2306.11363).

Hidden patches are dropped, not zeroed, so a mask is the ids of the patches that stay. Their number
is a Python int fixed by the config, so a training stage compiles once. Ids are drawn on the device,
afresh for each image and step.
"""

import jax
import jax.numpy as jnp


def num_visible(mask, grid: tuple[int, int]) -> int:
    """The number V of visible patches of an image, as in the official implementation.

    Args:
      mask: `config.mask`: kind ("none", "patch", "block", "crop"), ratio, block_size, crop_size.
      grid: patches (down, across).

    `patch` hides int(ratio * N) patches. `block` hides int(ratio * N) // b**2 whole blocks of b x b
    patches. `crop` keeps one window of crop_size x crop_size patches, whatever the ratio.
    """
    num_patches = grid[0] * grid[1]
    if mask.kind == "none":
        return num_patches
    if mask.kind == "crop":
        return mask.crop_size**2
    num_hidden = int(mask.ratio * num_patches)
    if mask.kind == "block":
        num_hidden = num_hidden // mask.block_size**2 * mask.block_size**2
    return num_patches - num_hidden


def draw_visible_ids(key: jax.Array, batch: int, mask, grid: tuple[int, int]) -> jax.Array | None:
    """Draws the visible patches of each image.

    Args:
      key: a PRNG key.
      batch: B, images.
      mask: `config.mask`, see `num_visible`.
      grid: patches (down, across).

    Returns:
      int32 [B, V], each row ascending (row-major patch order) and without repeats; None if the
      kind is "none".
    """
    if mask.kind == "none":
        return None
    if mask.kind == "crop":
        return _crop_ids(key, batch, mask.crop_size, grid)
    block = mask.block_size if mask.kind == "block" else 1
    rows, cols = grid[0] // block, grid[1] // block
    keep = num_visible(mask, grid) // block**2
    # A random permutation of the blocks; the first `keep` are visible, so the count is exact.
    order = jnp.argsort(jax.random.uniform(key, (batch, rows * cols)), axis=-1)
    ids = order[:, :keep].astype(jnp.int32)
    if block > 1:
        within = _window(block, grid[1])
        corner = (ids // cols) * block * grid[1] + (ids % cols) * block
        ids = (corner[:, :, None] + within).reshape(batch, -1)
    return jnp.sort(ids, axis=-1)


def _crop_ids(key, batch, size, grid):
    key_row, key_col = jax.random.split(key)
    row = jax.random.randint(key_row, (batch, 1), 0, grid[0] - size + 1)
    col = jax.random.randint(key_col, (batch, 1), 0, grid[1] - size + 1)
    return (row * grid[1] + col + _window(size, grid[1])).astype(jnp.int32)


def _window(size, grid_cols):
    """Ids of a size x size window at the grid's origin, row-major, [size * size]."""
    return (jnp.arange(size)[:, None] * grid_cols + jnp.arange(size)).reshape(-1)
