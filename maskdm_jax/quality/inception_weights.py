"""Weights of the FID Inception-v3: finds, checks and reads them.

Two files are known, told apart by their content:

- pytorch-fid's published file, the whole network, in PyTorch's format with batch norm apart;
- an .npz of the TensorFlow graph's names (`mixed_3_tower_conv/w`, HWIO, and `/b`) with batch norm
  folded in, float32 or float16, which ends at `mixed_7` (Mixed_6e): features 64, 192 and 768.
"""

import hashlib
import os
import pathlib
import re
import urllib.error
import urllib.request
import zipfile

import numpy as np

from maskdm_jax.errors import ConfigError
from maskdm_jax.quality.frechet import BAD_NPZ
from maskdm_jax.quality.inception import Weights, expected_params
from maskdm_jax.run import files, progress
from maskdm_jax.weights import torch_file

NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_BATCH_NORM_EPS = 0.001
_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
# Blocks of the graph, in order, and the branches of each kind by the graph's names.
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e")
_BRANCHES = {
    "5": {"": "branch1x1", "tower": "branch5x5", "tower_1": "branch3x3dbl"},
    "6a": {"": "branch3x3", "tower": "branch3x3dbl"},
    "6": {"": "branch1x1", "tower": "branch7x7", "tower_1": "branch7x7dbl"},
}


def load(path: str = "", flag: str = "--inception_weights") -> Weights:
    """The weights of the file at `path`; of pytorch-fid's, downloaded once, if it is empty.

    Raises:
      ConfigError: if the file is missing, damaged or another network's, or cannot be downloaded or
        read, with what to type.
    """
    path = files.local_path(path, flag) if path else _published(flag)
    if not path.is_file():
        raise ConfigError(
            f"{flag} {path} is not a file; expected {NAME} from {URL}, or an .npz of the network "
            f"up to mixed_7; type {flag}=FILE"
        )
    try:
        is_npz = zipfile.is_zipfile(path) and _is_npz(path)
        params = _read_npz(path) if is_npz else None
    except BAD_NPZ as error:
        raise ConfigError(
            f"{flag} {path} is damaged: {error}; fetch it again, then type the same command"
        ) from error
    if is_npz:
        last = 768
    else:
        params, last = _read_torch(path, flag), "logits"
    _check(params, last, f"{flag} {path}")
    return Weights(params, last, _sha256(path))


def cache_dir() -> pathlib.Path:
    """Where the published file is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root).expanduser() / "maskdm_jax"


def _published(flag):
    path = cache_dir() / NAME
    advice = (
        f"download it from {URL} and type {flag}=FILE, or type "
        f"{flag.replace('inception_weights', 'features')}=768 with an .npz of the network up to "
        "mixed_7"
    )
    if not path.exists():
        progress.remark(f"downloading {NAME} (91 MiB) into {path.parent}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.whole(path) as unfinished, urllib.request.urlopen(URL, timeout=30) as reply:
                with unfinished.open("wb") as file:
                    while block := reply.read(1 << 20):
                        file.write(block)
                _check_sha256(unfinished, f"the download of {NAME}", advice)
        except (OSError, urllib.error.URLError) as error:
            raise ConfigError(
                f"the weights of the FID network cannot be downloaded ({error}); {advice}"
            ) from error
    _check_sha256(path, str(path), f"delete it and run again, or {advice}")
    return path


def _check_sha256(path, what, advice):
    if (found := _sha256(path)) != SHA256:
        raise ConfigError(
            f"{what} has SHA-256 {found[:16]}..., expected {SHA256[:16]}...; {advice}"
        )


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_npz(path):
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _read_npz(path):
    params = {}
    with np.load(path) as stored:
        for name in stored.files:
            layer, _, part = name.rpartition("/")
            field = {"w": "kernel", "b": "bias"}.get(part, part)
            params.setdefault(_torch_name(layer), {})[field] = stored[name].astype(np.float32)
    return params


def _torch_name(layer):
    """mixed_3_tower_conv_1 -> Mixed_6a.branch3x3dbl_2; a name of another form stays as it is."""
    if layer in _STEM:
        return _STEM[layer]
    match = re.fullmatch(r"mixed(?:_(\d))?(?:_(tower(?:_\d)?))?_conv(?:_(\d))?", layer)
    if not match or int(match[1] or 0) >= len(_BLOCKS):
        return layer
    block = _BLOCKS[int(match[1] or 0)]
    branches = _BRANCHES.get(block) or _BRANCHES[block[0]]
    tower, index = match[2] or "", int(match[3] or 0)
    if tower == "tower_2":
        return f"Mixed_{block}.branch_pool"
    if tower not in branches:
        return layer
    return f"Mixed_{block}.{branches[tower]}" + (f"_{index + 1}" if tower else "")


def _read_torch(path, flag):
    try:
        state = torch_file.load(str(path))
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}; expected {NAME}; type {flag}=FILE") from error
    if not isinstance(state, dict):
        raise ConfigError(
            f"{flag} {path} holds a {type(state).__name__}; expected {NAME}; type {flag}=FILE"
        )
    return from_torch(state)


def from_torch(state: dict) -> dict[str, dict[str, np.ndarray]]:
    """Parameters from pytorch-fid's state dict of arrays: batch norm folded, kernels as HWIO."""
    params = {}
    for name, value in state.items():
        layer, _, field = name.rpartition(".conv.")
        if layer and field == "weight" and np.ndim(value) == 4:
            norm = {
                k: np.asarray(state.get(f"{layer}.bn.{k}", np.nan), np.float64)
                for k in ("weight", "bias", "running_mean", "running_var")
            }
            scale = norm["weight"] / np.sqrt(norm["running_var"] + _BATCH_NORM_EPS)
            kernel = np.asarray(value, np.float64).transpose(2, 3, 1, 0) * scale
            bias = norm["bias"] - norm["running_mean"] * scale
            params[layer] = {
                "kernel": kernel.astype(np.float32),
                "bias": bias.astype(np.float32),
            }
        elif name == "fc.weight":
            params["fc"] = {"kernel": np.asarray(value, np.float32).T}
    return params


def _check(params, last, what):
    """Refuses parameters that are not this network's, with the first difference."""
    expected = expected_params(last)
    for layer in sorted(expected.keys() | params.keys()):
        found = {k: v.shape for k, v in params.get(layer, {}).items()}
        wanted = {k: v.shape for k, v in expected.get(layer, {}).items()}
        if found != wanted:
            raise ConfigError(
                f"{what} is another network than the FID Inception-v3: {layer} is "
                f"{found or 'missing'}, expected {wanted or 'no such layer'}; type the path of "
                f"{NAME}, or of an .npz of the network up to mixed_7"
            )
        if not all(np.isfinite(v).all() for v in params[layer].values()):
            raise ConfigError(
                f"{what} is damaged: {layer} is not finite; get the file again, and type the same "
                "command"
            )
