"""Weights for another patch size or another grid of patches, by rules that keep the function.

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
    """How an image becomes tokens: the patch grid (rows, columns), and pixels on a patch's side."""

    grid: tuple[int, int]
    patch_size: int


class Outcome(NamedTuple):
    """Names of the parameters that `carry` keeps, resizes, leaves out and leaves fresh."""

    kept: list[str]
    resized: list[str]
    left_out: list[str]
    fresh: list[str]


def geometry(config) -> Geometry:
    """The geometry of a config."""
    patch_size = config.model.patch_size
    return Geometry(grid_shape(config.data.image_size, patch_size), patch_size)


def carry(params, fresh, old: Geometry, new: Geometry):
    """Parameters for a network with `fresh` ones, from those of a network of the same width.

    Args:
      params: float32 arrays of the old network, for the geometry `old`.
      fresh: those of the new network, for `new`; the result has their structure. A parameter that
        only they have stays fresh, and one that only `params` has is left out.
      old: its patch size must be a multiple or a divisor of the new one.
      new: see `old`.
    """
    given = _by_name(params)

    def chosen(path, leaf):
        name = _name(path)
        found = resized(name, given[name], old, new) if name in given else leaf
        return found if found.shape == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(chosen, fresh)


def outcome(params, fresh, old: Geometry, new: Geometry) -> Outcome:
    """What `carry` does with each parameter; arrays or their shapes."""
    given, wanted = _by_name(params), _by_name(fresh)
    result = Outcome([], [], [n for n in given if n not in wanted], [])
    for name, leaf in wanted.items():
        if name not in given:
            result.fresh.append(name)
            continue
        made = jax.eval_shape(lambda x, name=name: resized(name, x, old, new), given[name])
        changed = old != new and name in _RULES and made.shape == leaf.shape
        if changed:
            result.resized.append(name)
        else:
            (result.kept if made.shape == leaf.shape else result.fresh).append(name)
    return result


def resized(name: str, array: jax.Array, old: Geometry, new: Geometry) -> jax.Array:
    """The parameter `name`, such as "patch_embed/kernel", for another geometry."""
    return _RULES[name](array, old, new) if name in _RULES and old != new else array


def _embed_kernel(kernel_PD, old, new):
    scale = (old.patch_size / new.patch_size) ** 2  # r**2 means are a sum
    return _over_cells(kernel_PD, old, new) * scale


def _output_kernel(kernel_DP, old, new):
    return _over_cells(kernel_DP.T, old, new).T


def _over_cells(x, old, new):
    """Means over cells, or values repeated in cells, of [P, ...]; P is p x p x C."""
    p, q, rest = old.patch_size, new.patch_size, x.shape[1:]
    channels = x.shape[0] // p**2
    if q <= p:
        cells = x.reshape(q, p // q, q, p // q, channels, *rest).mean((1, 3))
    else:
        cells = x.reshape(p, p, channels, *rest).repeat(q // p, 0).repeat(q // p, 1)
    return cells.reshape(q**2 * channels, *rest)


def _position(table_LD, old, new):
    if old.grid == new.grid:
        return table_LD
    extra = table_LD.shape[0] - math.prod(old.grid)  # the rows of time and class
    rows_HWD = table_LD[extra:].reshape(*old.grid, -1)
    rows_HWD = jax.image.resize(rows_HWD, (*new.grid, rows_HWD.shape[-1]), "bicubic")
    return jnp.concatenate([table_LD[:extra], rows_HWD.reshape(-1, rows_HWD.shape[-1])])


_RULES = {
    "patch_embed/kernel": _embed_kernel,
    "output/kernel": _output_kernel,
    "output/bias": _over_cells,
    "position": _position,
}


def _by_name(tree):
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
