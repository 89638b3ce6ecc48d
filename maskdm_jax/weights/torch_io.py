"""Checkpoints of the official PyTorch implementation, and parameters of this U-ViT.

An official `.pt` file holds `model` (the network's weights under `model.*`, and the noise
schedule's tables) and `ema` (their average under `ema_model.model.*`, and a second copy of the
weights under `online_model.model.*`). PyTorch is not needed.

    python -m maskdm_jax.weights.torch_io export WORKDIR --out=FILE.pt
"""

import math
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from maskdm_jax.diffusion import ddpm
from maskdm_jax.model.sizes import SIZES, grid_shape
from maskdm_jax.weights import torch_file

PREFIXES = {"raw": "model.", "ema": "ema_model.model."}
GROUPS = {"ema": "ema", "raw": "model"}
_PATCH_EMBED = "encoder.patch_embed.proj.weight"


class Official(NamedTuple):
    """What an official `.pt` file holds of a network.

    Fields:
      params: this U-ViT's parameters, float32.
      betas: of its noise schedule, [T]; None if the file has none.
      patch_size: side of a patch in pixels.
      channels: of its images.
      step: updates; None if the file does not say.
    """

    params: dict
    betas: np.ndarray | None
    patch_size: int
    channels: int
    step: int | None = None


def load_official(path: str, weights: str = "ema") -> Official:
    """Reads an official `.pt` file.

    Args:
      path: the file.
      weights: "raw" or "ema".

    Raises:
      ValueError: if the file is not an official checkpoint: why not.
    """
    tree, group = torch_file.load(path), GROUPS[weights]
    if not isinstance(tree, dict) or not isinstance(tree.get(group), dict):
        entries = tree if isinstance(tree, dict) and "model" not in tree else {}
        entries = {k: v for k, v in entries.items() if isinstance(v, torch_file.Tensor)}
        other = f", but weights of another network: {_listed(entries)}" if entries else ""
        raise ValueError(f"{path} has no '{group}' entry{other}")
    tensors = {k: v for k, v in tree[group].items() if isinstance(v, torch_file.Tensor)}
    try:
        arrays = {k: np.asarray(v, np.float32) for k, v in tensors.items()}
        params = from_official(arrays, weights)
        betas = tree.get("model", {}).get("betas")
        betas = None if betas is None else np.asarray(betas, np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    _, channels, patch_size, _ = tensors[f"{PREFIXES[weights]}{_PATCH_EMBED}"].shape
    step = tree.get("step")
    return Official(params, betas, patch_size, channels, step if type(step) is int else None)


def from_official(state_dict: dict[str, np.ndarray], weights: str = "raw") -> dict:
    """This U-ViT's parameters from an official state dict of NumPy arrays.

    The network's entries and the parameters must match one to one; the schedule's tables are left
    out. `class_embed` is the table of labels, and below it the row for "no class".

    Raises:
      ValueError: listing the entries that are missing, or that have no place here.
    """
    prefix = PREFIXES[weights]
    rest = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if not any(name.startswith("encoder") for name in rest):
        raise ValueError(f"no weights under '{prefix}encoder*'")
    indices = [re.match(r"encoder\.in_blocks\.(\d+)\.", name) for name in rest]
    num_skips = 1 + max((int(found[1]) for found in indices if found), default=-1)
    entries = list(
        _entries(
            num_skips,
            has_classes="encoder.label_emb.weight" in rest,
            has_time_mlp=any(name.startswith("encoder.time_embed.") for name in rest),
            has_qkv_bias=any(name.endswith(".attn.q_bias") for name in rest),
        )
    )
    names = [entry.theirs for entry in entries]
    if missing := [name for name in names if name not in rest]:
        raise ValueError(f"official weights that are missing: {_some(missing)}")
    if unplaced := {name: x for name, x in rest.items() if name not in names}:
        raise ValueError(f"official weights with no place in this U-ViT: {_listed(unplaced)}")
    flat = {}
    for theirs, ours, kind in entries:
        x = rest[theirs]
        if kind == "kernel":
            x = x.T
        elif kind == "patches":  # [D, C, p, p] -> [(p p C), D]: a convolution of stride p as matmul
            x = x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
        elif kind == "position":
            x = x[0]
        elif kind == "labels":
            x = np.concatenate([x, flat[ours]])
        flat[ours] = x
    return traverse_util.unflatten_dict(flat, sep="/")


def to_official(params: dict, patch_size: int, channels: int) -> dict[str, np.ndarray]:
    """The inverse of `from_official`: the network's entries without a prefix, in PyTorch's order.

    Args:
      params: this U-ViT's parameters; those of pooled tokens are left out.
      patch_size: side of a patch in pixels.
      channels: of the images.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    entries = _entries(
        sum(name.startswith("in_block_") for name in params),
        has_classes="class_embed" in params,
        has_time_mlp="time_mlp_in" in params,
        has_qkv_bias="q_bias" in params["mid_block"],
    )
    state = {}
    for theirs, ours, kind in entries:
        x = np.asarray(flat[ours])
        if kind == "kernel":
            x = x.T
        elif kind == "patches":
            x = x.reshape(patch_size, patch_size, channels, -1).transpose(3, 2, 0, 1)
        elif kind == "position":
            x = x[None]
        elif kind in ("labels", "no class"):
            x = x[:-1] if kind == "labels" else x[-1:]
        state[theirs] = x
    return state


class _Entry(NamedTuple):
    theirs: str
    ours: str
    kind: str = ""


def _entries(
    num_skips: int, has_classes: bool, has_time_mlp: bool, has_qkv_bias: bool
) -> Iterator[_Entry]:
    """The official name and ours of each array, in the order of an official state dict."""

    def dense(theirs, ours):
        yield _Entry(f"{theirs}.weight", f"{ours}/kernel", "kernel")
        yield _Entry(f"{theirs}.bias", f"{ours}/bias")

    def norm(theirs, ours):
        yield _Entry(f"{theirs}.weight", f"{ours}/scale")
        yield _Entry(f"{theirs}.bias", f"{ours}/bias")

    def block(theirs, ours, has_skip=False):
        yield from norm(f"{theirs}.norm1", f"{ours}/norm_attention")
        if has_qkv_bias:
            yield _Entry(f"{theirs}.attn.q_bias", f"{ours}/q_bias")
            yield _Entry(f"{theirs}.attn.v_bias", f"{ours}/v_bias")
        yield _Entry(f"{theirs}.attn.qkv.weight", f"{ours}/qkv/kernel", "kernel")
        yield from dense(f"{theirs}.attn.proj", f"{ours}/proj")
        yield from norm(f"{theirs}.norm2", f"{ours}/norm_mlp")
        yield from dense(f"{theirs}.mlp.fc1", f"{ours}/mlp_in")
        yield from dense(f"{theirs}.mlp.fc2", f"{ours}/mlp_out")
        if has_skip:
            yield from dense(f"{theirs}.skip_linear", f"{ours}/skip")

    if has_classes:
        yield _Entry("encoder.uncond_embed", "class_embed/embedding", "no class")
    yield _Entry("encoder.encoder_pos_embed", "position", "position")
    yield _Entry(_PATCH_EMBED, "patch_embed/kernel", "patches")
    yield _Entry("encoder.patch_embed.proj.bias", "patch_embed/bias")
    if has_classes:
        yield _Entry("encoder.label_emb.weight", "class_embed/embedding", "labels")
    if has_time_mlp:
        yield from dense("encoder.time_embed.0", "time_mlp_in")
        yield from dense("encoder.time_embed.2", "time_mlp_out")
    for i in range(num_skips):
        yield from block(f"encoder.in_blocks.{i}", f"in_block_{i}")
    yield from block("encoder.mid_block", "mid_block")
    for i in range(num_skips):
        yield from block(f"encoder.out_blocks.{i}", f"out_block_{i}", has_skip=True)
    yield from norm("encoder.norm", "norm")
    yield from dense("encoder_to_output", "output")


def config_of(official: Official, config):
    """A copy of `config` with the fields that follow from an official file.

    The file has no number of heads, but each named size has its own. It predicts eps. `config`
    decides what is left open: the shape of a grid that is not square, and which of two noise
    schedules with the same betas is meant. A schedule without a name is "unknown".

    Raises:
      ValueError: if the position table fits neither a square grid nor that of `config`.
    """
    params, patch_size = official.params, official.patch_size
    num_tokens, width = params["position"].shape
    num_classes = len(params["class_embed"]["embedding"]) - 1 if "class_embed" in params else 0
    num_patches = num_tokens - (2 if num_classes else 1)
    num_skips = sum(name.startswith("in_block_") for name in params)
    grid = grid_shape(config.data.image_size, config.model.patch_size)
    if math.prod(grid) != num_patches:
        grid = (math.isqrt(num_patches),) * 2
    if math.prod(grid) != num_patches:
        raise ValueError(
            f"the position table has {num_patches} rows for patches, which is no square grid, nor "
            f"that of data.image_size {tuple(config.data.image_size)}"
        )
    depth = 2 * num_skips + 1
    found = {
        "data.channels": official.channels,
        "data.image_size": tuple(side * patch_size for side in grid),
        "model.width": width,
        "model.depth": depth,
        "model.patch_size": patch_size,
        "model.mlp_ratio": params["mid_block"]["mlp_in"]["kernel"].shape[1] / width,
        "model.qkv_bias": "q_bias" in params["mid_block"],
        "model.mlp_time_embed": "time_mlp_in" in params,
        "model.num_classes": num_classes,
        "model.wavelet": "none",
        "model.coarse": (),
        "diffusion.framework": "ddpm",
        "diffusion.prediction": "eps",
        "mask.hidden": "drop",
    }
    heads = {(s.width, s.depth): s.num_heads for s in SIZES.values()}
    if (width, depth) in heads:
        found["model.num_heads"] = heads[width, depth]
    if official.betas is not None:
        size = found["data.image_size"]
        found["diffusion.schedule"] = ddpm.schedule_of(official.betas, config.diffusion, size)
        found["diffusion.num_timesteps"] = len(official.betas)
    stored = config.copy_and_resolve_references()
    stored.update_from_flattened_dict(found)
    return stored


def _listed(arrays):
    """Names and shapes; convolutions of 3 x 3, which other U-ViTs end with, come first."""
    shapes = {name: list(x.shape) for name, x in arrays.items()}
    shapes = dict(sorted(shapes.items(), key=lambda item: item[1][2:] != [3, 3]))
    return _some(
        [
            f"{name} {shape}{', a 3x3 convolution' if shape[2:] == [3, 3] else ''}"
            for name, shape in shapes.items()
        ]
    )


def _some(names):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def main(argv: list[str] | None = None) -> int:
    """The command line: export."""
    from maskdm_jax.weights import export

    return export.main(argv)


if __name__ == "__main__":
    sys.exit(main())
