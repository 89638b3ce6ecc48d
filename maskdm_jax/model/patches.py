"""The conversion between pixels and tokens, also for rectangular images; no other code does it.

A patch is `patch_size` x `patch_size` pixels. Its P = patch_size * patch_size * C values are in
(row, column, channel) order, and patches are in row-major order, as in the official model's output.
Pixels 0 .. 255 map to -1 .. 1 in tokens.

With `model.wavelet = "haar"` the network reads and writes Haar coefficients of these values, see
`to_haar`. That is an orthogonal matrix on each token at the two ends of the network (`uvit.apply`):
unit noise stays unit noise, squared errors stay the same, and a sampler clips pixels as ever.
"""

import einops
import jax
import jax.numpy as jnp

from maskdm_jax.model.sizes import grid_shape


def patch_dim(patch_size: int, channels: int) -> int:
    """P, the number of values in a patch."""
    return patch_size**2 * channels


def cut(image_BHWC: jax.Array, patch_size: int, visible_BV: jax.Array | None = None) -> jax.Array:
    """Pixels as tokens: the visible patches of each image, float32 [B, V, P] in [-1, 1].

    Args:
      image_BHWC: uint8 [B, H, W, C]; H and W are multiples of patch_size.
      patch_size: side of a patch in pixels.
      visible_BV: ids of the patches to keep, int32 [B, V]; None for all N, in order.
    """
    # Gather uint8 first, then scale: hidden patches are never converted.
    x_BVP = gather(patchify(image_BHWC, patch_size), visible_BV)
    return x_BVP.astype(jnp.float32) / 127.5 - 1


def pool(
    image_BHWC: jax.Array, patch_size: int, pool_size: int, pooled_BG: jax.Array | None = None
) -> jax.Array:
    """Pixels as pooled tokens, float32 [B, G, P] in [-1, 1].

    A pooled token is a square of q x q patches, q = pool_size: its (q p) x (q p) pixels, averaged
    over squares of q x q pixels to the p x p x C values of one patch.

    Args:
      image_BHWC: uint8 [B, H, W, C]; H and W are multiples of q p.
      patch_size: p, side of a patch in pixels.
      pool_size: q, side of a pooled token in patches.
      pooled_BG: ids of the squares to give, int32 [B, G], row-major on the grid of all squares;
        None for all, in order.
    """
    mean_BHWC = _means(image_BHWC.astype(jnp.float32), pool_size)  # sums of uint8 are exact
    return gather(patchify(mean_BHWC, patch_size), pooled_BG) / 127.5 - 1


def average(x_BNP: jax.Array, patch_size: int, image_size: tuple[int, int], size: int) -> jax.Array:
    """The values of all pooled tokens, [B, N / q^2, P], from those of all patches; q = size."""
    return patchify(_means(unpatchify(x_BNP, patch_size, image_size), size), patch_size)


def repeat(x_BGP: jax.Array, patch_size: int, image_size: tuple[int, int], size: int) -> jax.Array:
    """The patches [B, N, P] in which each square of q x q pixels has one value, q = size: those
    whose `average` is x_BGP."""
    height, width = image_size
    image_BHWC = unpatchify(x_BGP, patch_size, (height // size, width // size))
    return patchify(image_BHWC.repeat(size, axis=1).repeat(size, axis=2), patch_size)


def _means(image_BHWC, size):
    return einops.reduce(image_BHWC, "b (h q1) (w q2) c -> b h w c", "mean", q1=size, q2=size)


def join(x_BNP: jax.Array, patch_size: int, image_size: tuple[int, int]) -> jax.Array:
    """Tokens as pixels: all N patches to uint8 images [B, H, W, C], rounded and clipped."""
    image_BHWC = unpatchify(x_BNP, patch_size, image_size)
    return jnp.clip(jnp.rint((image_BHWC + 1) * 127.5), 0, 255).astype(jnp.uint8)


def gather(x_BNP: jax.Array, visible_BV: jax.Array | None) -> jax.Array:
    """The visible patches [B, V, P] of [B, N, P]; all of them if `visible_BV` is None."""
    if visible_BV is None:
        return x_BNP
    return jnp.take_along_axis(x_BNP, visible_BV[:, :, None], axis=1)


def patchify(image_BHWC: jax.Array, patch_size: int) -> jax.Array:
    """Rearranges images [B, H, W, C] of any dtype into patches [B, N, P]."""
    return einops.rearrange(
        image_BHWC, "b (h p1) (w p2) c -> b (h w) (p1 p2 c)", p1=patch_size, p2=patch_size
    )


def unpatchify(x_BNP: jax.Array, patch_size: int, image_size: tuple[int, int]) -> jax.Array:
    """Rearranges patches [B, N, P] into images [B, H, W, C]."""
    rows, _ = grid_shape(image_size, patch_size)
    return einops.rearrange(
        x_BNP, "b (h w) (p1 p2 c) -> b (h p1) (w p2) c", h=rows, p1=patch_size, p2=patch_size
    )


def to_haar(x_BVP: jax.Array, patch_size: int) -> jax.Array:
    """One level of the orthonormal Haar transform of each token's pixels, float32 [B, V, P].

    The coefficients are in (row, column, band, channel) order: those of a patch of p x p x C pixels
    are the patch of p/2 x p/2 x 4C values of the transformed image, in the order of `patchify`.

    Args:
      x_BVP: pixels in (row, column, channel) order, float32.
      patch_size: p, even.
    """
    half = patch_size // 2
    squares = einops.rearrange(
        x_BVP, "b v (h i w j c) -> (i j) b v h w c", h=half, i=2, w=half, j=2
    )
    return einops.rearrange(jnp.stack(_haar(*squares)), "k b v h w c -> b v (h w k c)")


def from_haar(x_BVP: jax.Array, patch_size: int) -> jax.Array:
    """The inverse of `to_haar`."""
    half = patch_size // 2
    bands = einops.rearrange(x_BVP, "b v (h w k c) -> k b v h w c", h=half, w=half, k=4)
    return einops.rearrange(
        jnp.stack(_haar(*bands)), "(i j) b v h w c -> b v (h i w j c)", i=2, j=2
    )


def _haar(a, b, c, d):
    """From a square of pixels a b / c d to its bands: mean, left - right, top - bottom, diagonal.

    The matrix is orthogonal and symmetric, so it is its own inverse.
    """
    return (a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2
