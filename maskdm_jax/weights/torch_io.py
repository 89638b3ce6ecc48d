"""Reads checkpoints of the official PyTorch implementation as parameters of this U-ViT.

An official `.pt` file holds `model` (the weights, under `model.*`) and `ema` (their average, under
`ema_model.model.*`). Only the reading of files needs PyTorch: `pip install "maskdm_jax[convert]"`.
"""

import pickle
import re
import zipfile
from typing import NamedTuple

import numpy as np

_DENSE = {
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "skip": "skip_linear",
}
_NORMS = {"norm_attention": "norm1", "norm_mlp": "norm2"}
# How files of PyTorch before 1.6 start: a pickle of a magic number.
_OLD_FORMAT = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_PATCH_EMBED = "encoder.patch_embed.proj.weight"
_PREFIX = {"raw": "model.", "ema": "ema_model.model."}


class Official(NamedTuple):
    """What an official `.pt` file holds of a network.

    Fields:
      params: this U-ViT's parameters, float32.
      betas: of its noise schedule, [T]; None if the file has none.
      patch_size: side of a patch in pixels.
      channels: of its images.
    """

    params: dict
    betas: np.ndarray | None
    patch_size: int
    channels: int


def load_tensors(path: str):
    """What a file of PyTorch holds, with tensors on the CPU; nothing but tensors is loaded.

    Raises:
      ImportError: if PyTorch is missing, with the command that installs it.
      ValueError: if the file holds anything else, or is not whole: why not.
    """
    _check_format(path)
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch; type: pip install 'maskdm_jax[convert]'"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {found[1]}" if found else "more than tensors"
        raise ValueError(f"{path} holds {what}, and loading that could run any code") from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path} cannot be read ({reason})") from error


def load_official(path: str, weights: str = "ema") -> Official:
    """Reads an official `.pt` file.

    Args:
      path: the file.
      weights: "raw" or "ema".

    Raises:
      ImportError: if PyTorch is missing, with the command that installs it.
      ValueError: if the file is not an official checkpoint: why not.
    """
    checkpoint = load_tensors(path)
    group = {"raw": "model", "ema": "ema"}[weights]
    if not isinstance(checkpoint, dict) or group not in checkpoint:
        raise ValueError(f"{path} has no '{group}' entry")
    tensors = {k: v for k, v in dict(checkpoint[group]).items() if hasattr(v, "numpy")}
    params = from_official({k: v.float().numpy() for k, v in tensors.items()}, weights)
    betas = dict(checkpoint.get("model", {})).get("betas")
    betas = betas.numpy() if hasattr(betas, "numpy") else None
    _, channels, patch_size, _ = tensors[f"{_PREFIX[weights]}{_PATCH_EMBED}"].shape
    return Official(params, betas, patch_size, channels)


def _check_format(path):
    """Raises ValueError unless `path` is a zip archive of PyTorch, or its format before 1.6."""
    with open(path, "rb") as file:
        start = file.read(len(_OLD_FORMAT))
    if not start:
        raise ValueError(f"{path} is empty")
    if start == _OLD_FORMAT:
        return
    if not start.startswith(b"PK"):
        what = "a safetensors file, " if path.endswith(".safetensors") else ""
        raise ValueError(f"{path} is {what}not a PyTorch checkpoint")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is a PyTorch checkpoint that was cut short")
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise ValueError(f"{path} is a zip archive, but not a PyTorch checkpoint")


def from_official(state_dict: dict[str, np.ndarray], weights: str = "raw") -> dict:
    """This U-ViT's parameters from an official, unconditional state dict of NumPy arrays.

    The network's entries and the parameters must match one to one; the schedule's buffers are left
    out.

    Raises:
      ValueError: listing the entries that are missing, or that have no place here.
    """
    prefix = _PREFIX[weights]
    rest = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    rest = {k: v for k, v in rest.items() if k.startswith("encoder")}
    if not rest:
        raise ValueError(f"no weights under '{prefix}encoder*'")

    missing = []

    def take(name):
        if name not in rest:
            missing.append(name)
        return rest.pop(name, np.zeros((1, 1, 1, 1)))

    def take_dense(name):
        layer = {"kernel": take(f"{name}.weight").T}
        if f"{name}.bias" in rest:
            layer["bias"] = take(f"{name}.bias")
        return layer

    def take_norm(name):
        return {"scale": take(f"{name}.weight"), "bias": take(f"{name}.bias")}

    def take_block(name):
        block = {ours: take_norm(f"{name}.{theirs}") for ours, theirs in _NORMS.items()}
        for ours, theirs in _DENSE.items():
            if f"{name}.{theirs}.weight" in rest:
                block[ours] = take_dense(f"{name}.{theirs}")
        for ours in ("q_bias", "v_bias"):
            if f"{name}.attn.{ours}" in rest:
                block[ours] = take(f"{name}.attn.{ours}")
        return block

    # [D, C, p, p] -> [(p p C), D]: the convolution of stride p as a matmul over patches.
    kernel = take(_PATCH_EMBED).transpose(2, 3, 1, 0)
    params = {
        "position": take("encoder.encoder_pos_embed")[0],
        "patch_embed": {
            "kernel": kernel.reshape(-1, kernel.shape[-1]),
            "bias": take("encoder.patch_embed.proj.bias"),
        },
        "mid_block": take_block("encoder.mid_block"),
        "norm": take_norm("encoder.norm"),
        "output": take_dense("encoder_to_output"),
    }
    for ours, theirs in (("in_block", "in_blocks"), ("out_block", "out_blocks")):
        i = 0
        while f"encoder.{theirs}.{i}.norm1.weight" in rest:
            params[f"{ours}_{i}"] = take_block(f"encoder.{theirs}.{i}")
            i += 1
    if missing:
        raise ValueError(f"official weights that are missing: {_some(missing)}")
    if rest:
        raise ValueError(f"official weights with no place in this U-ViT: {_some(sorted(rest))}")
    return params


def _some(names):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"
