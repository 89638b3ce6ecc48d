"""A trained network from a run's checkpoint or an official PyTorch file: config and parameters.

An official file holds no config. Its arrays give width, depth, patch size and channels, and its
betas the noise schedule; `fields` give what is left.
"""

import hashlib
import numbers
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from maskdm_jax import arguments, averages, checkpoint, draw, phases, sharding
from maskdm_jax.config import (
    FIELDS,
    check_field,
    default_config,
    described,
    differences,
    validate,
    validate_devices,
    whole_images,
)
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import MEANING, SHAPE
from maskdm_jax.model.sizes import SIZES
from maskdm_jax.run import faults, files, hashes
from maskdm_jax.run.progress import remark
from maskdm_jax.weights import torch_io

# What an official file leaves open; the second line only if it has no betas.
_NOT_IN_A_FILE = ("model.num_heads", "data.image_size")
_IN_BETAS = ("diffusion.schedule", "diffusion.num_timesteps")


class Trained(NamedTuple):
    """A trained network.

    Fields:
      config: of the training, with changed fields, for all devices of this process.
      params: float32 parameters on the mesh of `config`.
      step: updates of the checkpoint; None for an official file that does not say.
      sha256: of the checkpoint or file.
    """

    config: Any
    params: dict
    step: int | None
    sha256: str


def read(
    path: str | pathlib.Path, step: int | None, weights: str, fields: Mapping[str, object]
) -> Trained:
    """Reads a trained network; `maskdm_jax.load` documents arguments and errors."""
    check_field("sample.weights", weights)
    if isinstance(step, bool) or not isinstance(step, numbers.Integral | None):
        raise ConfigError(
            f"step is {step!r}; expected an int, or None for the newest; type step=None"
        )
    step = None if step is None else int(step)  # NumPy's integers are no JSON
    path = files.place(path, "path")
    if path.is_file():
        return _official(files.local_path(path, "path"), weights, fields)
    return _run(path, step, weights, fields)


def _run(path, step, weights, fields):
    workdir, step = _find_run(path, step)
    where = f"checkpoint {step} of {workdir}"
    stored = whole_images(phases.at(checkpoint.load_config(workdir, step), step).config)
    stored.sample.weights = weights
    config = _configured(stored, fields, where)
    abstract = draw.abstract_params(config, sharding.make_mesh(config))
    if weights == "raw":
        params = checkpoint.restore_item(workdir, step, "params", abstract)
    else:
        params = averages.restore(config, workdir, step, abstract, config.sample.ema_std)
    faults.check_finite(params, where, "load(PATH) of another run")
    sha256 = hashes.fingerprint(checkpoint.directory(workdir) / str(step))
    return Trained(config, params, step, sha256)


def _find_run(path, step):
    """(workdir, step) of a workdir, of its checkpoints or of one of them."""
    if path.name.isdecimal() and path.parent.name == "checkpoints":
        if step not in (None, int(path.name)):
            raise ConfigError(
                f"{path} is the checkpoint of step {path.name}, and step is {step}; expected one "
                f"of them; type load({str(path.parents[1])!r}, step={step})"
            )
        path, step = path.parents[1], int(path.name)
    elif path.name == "checkpoints":
        path = path.parent
    found = checkpoint.steps(path)
    if not found:
        what = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"{path} {what}; expected a run's --workdir, or an official .pt file; type load(PATH)"
        )
    return path, checkpoint.find_step(path, step, instead="load(PATH) of another run")


def _official(path, weights, fields):
    try:
        official = torch_io.load_official(str(path), weights)
        stored = _stored(path, official, fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"{error}; expected an official .pt file, or a run's --workdir; type load(PATH)"
        ) from error
    stored.sample.weights = weights
    free = _NOT_IN_A_FILE + (_IN_BETAS if official.betas is None else ())
    config = _configured(stored, fields, str(path), free)
    abstract = draw.abstract_params(config, sharding.make_mesh(config))
    shapes = [jax.tree.map(np.shape, tree) for tree in (official.params, abstract)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{path} holds weights that do not form the U-ViT of its width and depth for images "
            f"of {config.data.image_size}; type fields={{'data.image_size': (HEIGHT, WIDTH)}}"
        )
    faults.check_finite(official.params, str(path), "load(PATH) of another file")
    where = jax.tree.map(lambda x: x.sharding, abstract)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Trained(config, jax.device_put(official.params, where), official.step, sha256)


def _stored(path, official, fields):
    """The config that follows from an official file, and, for what it leaves open, `fields`."""
    base = default_config()
    base.model.patch_size = official.patch_size
    given = {name: fields[name] for name in _NOT_IN_A_FILE if name in fields}
    for name, value in given.items():
        check_field(name, value)
    base.update_from_flattened_dict(given)
    stored = torch_io.config_of(official, base)
    if stored.diffusion.schedule == "unknown":
        raise ConfigError(
            f"{path} was trained with a noise schedule that is none of "
            f"{FIELDS['diffusion.schedule'].kind.expected.removeprefix('one of ')}; "
            "expected the betas of one of them; type load(PATH) of another file"
        )
    if not stored.model.num_heads:
        raise ConfigError(
            f"{path} has width {stored.model.width} and depth {stored.model.depth}, which is none "
            f"of the sizes {', '.join(SIZES)}, and does not hold its number of attention heads; "
            "type fields={'model.num_heads': HEADS}"
        )
    return stored


def _configured(stored, fields, where, free=()):
    """The config to compute with on this process's devices."""
    config = stored.copy_and_resolve_references()
    config.mesh.update(data=-1, fsdp=1)
    num_devices = jax.device_count()
    config.sample.batch_size = -(-config.sample.batch_size // num_devices) * num_devices
    arguments.change(config, fields)
    names = [n for n in differences(config, stored, (SHAPE, MEANING)) if n not in free]
    if names:
        raise ConfigError(
            f"fields do not fit {where}: {described(config, stored, names)}; leave out "
            f"{', '.join(names)}"
        )
    validate(config)
    validate_devices(config, num_devices, "sample")
    if advice := sharding.bfloat16_advice(jax.devices()[0], config.model.dtype):
        remark(f"{advice}; type fields={{'model.dtype': 'float32'}}")
    return config
