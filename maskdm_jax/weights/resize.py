"""Weights for another patch size, grid of patches, number of channels or of classes, by rules that
keep the function.

From patches of side p to smaller ones of side q = p / r, a small patch is taken for the large one
that it becomes when each pixel is repeated in a cell of r x r pixels: the embedding's kernel is
summed over each cell, and the output is the mean of the large patch's output over each cell. From q
to p = q r, a large patch is taken for the small one of its cells' means, and each value of the
small patch's output is repeated in its cell. Both give the same tokens and outputs for patches that
are constant on cells. Position rows are interpolated bicubically over the grid.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskdm_jax.model.sizes import grid_shape


class Geometry(NamedTuple):
    """How an image becomes tokens.

    Fields:
      grid: patches (down, across).
      patch_size: pixels on a patch's side.
      channels: of the images.
      num_classes: 0 if there is no class token.
      wavelet: `model.wavelet`; with "haar", kernels are in the order of coefficients, not pixels.
    """

    grid: tuple[int, int]
    patch_size: int
    channels: int = 3
    num_classes: int = 0
    wavelet: str = "none"


def geometry(config) -> Geometry:
    """The geometry of a config."""
    patch_size = config.model.patch_size
    return Geometry(
        grid_shape(config.data.image_size, patch_size),
        patch_size,
        config.data.channels,
        config.model.num_classes,
        config.model.wavelet,
    )


def resized(name: str, array: jax.Array, old: Geometry, new: Geometry, fresh=None) -> jax.Array:
    """The parameter `name`, such as "patch_embed/kernel", for another geometry.

    Args:
      name: its path in the tree.
      array: the old network's.
      old, new: between which `change` names a rule.
      fresh: the new network's, of which a class row is taken where the old one has no classes.
    """
    return _RULES[name](array, old, new, fresh) if name in _RULES and old != new else array


def change(name: str, old: Geometry, new: Geometry) -> str | None:
    """What `resized` does with a parameter, in words; "" if nothing; None if no rule covers it."""
    if name in ("patch_embed/kernel", "output/kernel", "output/bias"):
        p, q = old.patch_size, new.patch_size
        if (
            p % q
            and q % p
            or old.channels != new.channels
            and 1 not in (old.channels, new.channels)
        ):
            return None
        same_pixels = p == q and old.channels == new.channels
        if not same_pixels and "haar" in (old.wavelet, new.wavelet):
            return None
        parts = [f"patch {p} -> {q}"] if p != q else []
        if old.channels != new.channels:
            parts.append(f"channels {old.channels} -> {new.channels}")
        return ", ".join(parts)
    if name == "position":
        parts = []
        if old.grid != new.grid:
            sides = ["{} x {}".format(*each.grid) for each in (old, new)]
            parts.append(f"grid {' -> '.join(sides)}, bicubic")
        if bool(old.num_classes) != bool(new.num_classes):
            parts.append("class row " + ("fresh" if new.num_classes else "left out"))
        return "; ".join(parts)
    if name == _CLASSES and old.num_classes != new.num_classes:
        return f"classes {old.num_classes} -> {new.num_classes}"
    return ""


def _embed_kernel(kernel_PD, old, new, _):
    made = _over_cells(kernel_PD, old, new)
    return made * (len(kernel_PD) / len(made))  # n means are a sum


def _output_kernel(kernel_DP, old, new, _):
    return _over_cells(kernel_DP.T, old, new).T


def _over_cells(x, old, new, _=None):
    """Means over cells, or values repeated in cells, of [P, ...]; P is p x p x C."""
    p, q, rest = old.patch_size, new.patch_size, x.shape[1:]
    channels = x.shape[0] // p**2
    if q <= p:
        cells = x.reshape(q, p // q, q, p // q, channels, *rest).mean((1, 3))
    else:
        cells = x.reshape(p, p, channels, *rest).repeat(q // p, 0).repeat(q // p, 1)
    if old.channels > new.channels:
        cells = cells.mean(2, keepdims=True)
    elif old.channels < new.channels:
        cells = cells.repeat(new.channels, 2)
    return cells.reshape(-1, *rest)


def _position(table_LD, old, new, fresh):
    extra = table_LD.shape[0] - math.prod(old.grid)  # the rows of class and time
    rows_ND = table_LD[extra:]
    if old.grid != new.grid:
        rows_HWD = rows_ND.reshape(*old.grid, -1)
        rows_HWD = jax.image.resize(rows_HWD, (*new.grid, rows_HWD.shape[-1]), "bicubic")
        rows_ND = rows_HWD.reshape(-1, rows_HWD.shape[-1])
    rows = [table_LD[:extra], rows_ND]
    if old.num_classes and not new.num_classes:
        rows[0] = table_LD[1:extra]
    elif new.num_classes and not old.num_classes:
        rows.insert(0, fresh[:1])
    return jnp.concatenate(rows)


def _class_rows(table_KD, old, new, _):
    """[labels; no class]; a label that only the new network has starts as "no class"."""
    labels, no_class = table_KD[: min(old.num_classes, new.num_classes)], table_KD[-1:]
    return jnp.concatenate([labels, no_class.repeat(new.num_classes + 1 - len(labels), 0)])


_CLASSES = "class_embed/embedding"
_RULES = {
    "patch_embed/kernel": _embed_kernel,
    "output/kernel": _output_kernel,
    "output/bias": _over_cells,
    "position": _position,
    _CLASSES: _class_rows,
}
