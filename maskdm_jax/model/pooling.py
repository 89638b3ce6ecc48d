"""The ends of the network for pooled tokens: their embedding, and their output.

A pooled token stands for a square of q x q patches, averaged to the P values of one patch
(`patches.pool`). It has layers of its own, because these values are not those of a patch: they are
smoother, and their noise is smaller. All blocks are shared. With `mask.hidden = "pool"` the hidden
blocks become such tokens, and whole images need none of these parameters. With `model.coarse`, so
does the whole image where the noise is strong, see `denoiser`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from maskdm_jax.model import linear


class Pooled(nn.Module):
    """The parameters of pooled tokens.

    Fields:
      grid: patches (down, across).
      size: q, patches on the side of a pooled token.
      patch_dim, width, dtype: the network's.
    """

    grid: tuple[int, int]
    size: int
    patch_dim: int
    width: int
    dtype: jnp.dtype

    def setup(self):
        self.patch_embed = linear.patch_embed(self.patch_dim, self.width, self.dtype)
        self.vector = self.param("vector", linear.kernel_init, (self.width,))
        self.norm = linear.Affine(self.width)
        self.output = linear.Linear(self.width, self.patch_dim)

    def embed(self, x_BGP: jax.Array, pooled_BG: jax.Array | None, rows_ND: jax.Array) -> jax.Array:
        """Tokens [B, G, D] of pooled values: a Linear layer, a position, and a learnt vector.

        The position is the mean of the position rows of the token's patches, times q / 2. The mean
        of q^2 independent rows is q times smaller than one, so at first a position is half the size
        of a patch's.

        Args:
          x_BGP: noisy pooled values.
          pooled_BG: ids of the squares, see `masking.draw_pooled_ids`; None: all, in order.
          rows_ND: the patches' rows of the position table, float32.
        """
        rows, cols = (side // self.size for side in self.grid)
        squares = rows_ND.reshape(rows, self.size, cols, self.size, self.width)
        position = squares.mean((1, 3)).reshape(-1, self.width) * (self.size / 2)
        position = position if pooled_BG is None else position[pooled_BG]
        return self.patch_embed(x_BGP) + (position + self.vector).astype(self.dtype)

    def predict(self, x_BGD: jax.Array) -> jax.Array:
        """The network's output for pooled tokens, float32 [B, G, P], from `layers.normalize`d
        ones."""
        kernel, bias = linear.folded(self.norm(), self.output(), self.dtype)
        return (x_BGD @ kernel).astype(jnp.float32) + bias
