"""Which patches are visible: patch, block and crop masks (section 3 of arXiv 2306.11363).

Hidden patches are dropped, not zeroed, so a mask is the ids of the patches that stay. With
`mask.hidden = "pool"`, a hidden block is cut into squares of q x q patches, each of which becomes
one pooled token. The numbers of both are Python ints fixed by the config, so a training stage
compiles once. Ids are drawn on the device, afresh for each image and step.
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


def num_pooled(mask, grid: tuple[int, int]) -> int:
    """The number G of pooled tokens of an image, of `mask.pool_size`^2 hidden patches each.

    It is 0 if hidden patches are dropped, or if `mask.ratio` hides no whole block.
    """
    if mask.hidden == "drop":
        return 0
    return (grid[0] * grid[1] - num_visible(mask, grid)) // mask.pool_size**2


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
    keep = num_visible(mask, grid) // block**2
    # The first `keep` blocks of a random order are visible, so the count is exact.
    return _members(_block_order(key, batch, block, grid)[:, :keep], block, grid)


def draw_pooled_ids(key: jax.Array, batch: int, mask, grid: tuple[int, int]) -> jax.Array | None:
    """Draws the pooled tokens of each image: the squares of the blocks that `draw_visible_ids`
    hides, given the same arguments.

    Returns:
      int32 [B, G], each row ascending and without repeats: ids on the grid of squares of
      `mask.pool_size` x `mask.pool_size` patches, row-major; None if there are none.
    """
    if not num_pooled(mask, grid):
        return None
    keep = num_visible(mask, grid) // mask.block_size**2
    hidden = _block_order(key, batch, mask.block_size, grid)[:, keep:]
    squares = (grid[0] // mask.pool_size, grid[1] // mask.pool_size)
    return _members(hidden, mask.block_size // mask.pool_size, squares)


def _block_order(key, batch, block, grid):
    """A random order of the blocks for each image, int32 [B, blocks]."""
    num_blocks = (grid[0] // block) * (grid[1] // block)
    order = jnp.argsort(jax.random.uniform(key, (batch, num_blocks)), axis=-1)
    return order.astype(jnp.int32)


def _members(blocks, size, grid):
    """Ids of all places of a grid in blocks of size x size, ascending: [B, blocks * size^2]."""
    cols = grid[1] // size
    corner = (blocks // cols) * size * grid[1] + (blocks % cols) * size
    ids = corner[:, :, None] + _window(size, grid[1])
    return jnp.sort(ids.reshape(len(blocks), -1), axis=-1)


def _crop_ids(key, batch, size, grid):
    key_row, key_col = jax.random.split(key)
    row = jax.random.randint(key_row, (batch, 1), 0, grid[0] - size + 1)
    col = jax.random.randint(key_col, (batch, 1), 0, grid[1] - size + 1)
    return (row * grid[1] + col + _window(size, grid[1])).astype(jnp.int32)


def _window(size, grid_cols):
    """Ids of a size x size window at the grid's origin, row-major, [size * size]."""
    return (jnp.arange(size)[:, None] * grid_cols + jnp.arange(size)).reshape(-1)
