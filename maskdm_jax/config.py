"""The config: every field with its default and meaning, and the checks that come before any work.

A file in configs/ starts from `default_config`, sets its claim, and returns it. The command line's
`--config.field=value` overrides the file. An unknown field is an error, and so is a value that
cannot work: `ConfigError`, one sentence with the field's name and what to type.
"""

import json
import pathlib

from ml_collections import config_dict

from maskdm_jax.errors import ConfigError
from maskdm_jax.model.sizes import dimensions, grid_shape


def default_config() -> config_dict.ConfigDict:
    """Every field, documented, with its default."""
    config = config_dict.ConfigDict()
    config.seed = 0  # weights, order of examples, masks, noise: all follow from it

    config.data = data = config_dict.ConfigDict()
    data.name = ""  # a data set that maskdm_jax.data.prepare wrote, or any TFDS set with images
    data.dir = "~/tensorflow_datasets"  # where TFDS data sets live
    data.split = "train"
    data.image_size = (64, 64)  # height, width in pixels
    data.channels = 3  # of the prepared set; the network takes 1 to 12
    data.flip = False  # mirror every second image, at random
    # Where decoded uint8 images live: "none" (decode every epoch), "host" (a file that is mapped
    # into memory and shared by processes) or "device" (the accelerator's memory).
    data.cache = "host"
    data.num_threads = 16  # decoding threads where nothing is cached

    config.model = model = config_dict.ConfigDict()
    model.size = "B"  # S, B, L or H; see model/sizes.py
    model.width = 0  # 0: as the size says; likewise the next two
    model.depth = 0  # blocks; 12 and 13 both build 6 + 1 + 6
    model.num_heads = 0
    model.patch_size = 4  # pixels
    model.mlp_ratio = 4.0
    model.qkv_bias = False  # biases on q and v
    model.mlp_time_embed = False  # two Linear layers after the timestep's sinusoids
    model.num_classes = 0  # 0: unconditional
    model.class_dropout = 0.1  # how often training drops the class, so that guidance can work
    model.dropout = 0.0
    model.remat = "none"  # "blocks": recompute each block in the backward pass; less memory
    model.attention = "auto"  # "xla", "cudnn", "pallas", "hopper", "splash" to insist
    model.dtype = "bfloat16"  # of matmuls and activations; parameters and statistics are float32

    config.mask = mask = config_dict.ConfigDict()
    mask.kind = "none"  # "none", "patch", "block" or "crop"
    mask.ratio = 0.9  # hidden share of the patches, 0 to 0.95; patch and block
    mask.block_size = 4  # patches on a block's side; divides the patch grid
    mask.crop_size = 16  # patches on the visible window's side; crop

    config.diffusion = diffusion = config_dict.ConfigDict()
    diffusion.schedule = "cosine"  # "linear", "cosine" or "shifted_cosine"
    diffusion.num_timesteps = 1000
    diffusion.prediction = "eps"  # what the network outputs: "eps", "x0" or "v"
    diffusion.loss = "l2"  # or "l1"

    config.optim = optim = config_dict.ConfigDict()
    optim.lr_peak = 2e-4
    optim.warmup_steps = 0  # linear, from 0
    optim.lr_schedule = "constant"  # after the warm-up; or "cosine", to 0 at train.num_steps
    optim.b1 = 0.99
    optim.b2 = 0.99
    optim.weight_decay = 0.03  # on every parameter
    optim.clip_norm = 0.0  # of the global gradient norm; 0: no clipping
    optim.accumulate_steps = 1  # microbatches that one batch is cut into, to save memory
    optim.ema_decay = 0.999
    optim.ema_ramp = True  # copy for 100 updates, then 1 - (1 + n)^(-2/3) up to ema_decay

    config.train = train = config_dict.ConfigDict()
    train.num_steps = 100_000  # updates
    train.batch_size = 256  # images, over all devices and hosts
    train.dry_run = False  # print the step's memory and the batches that fit, and train nothing
    train.log_every_steps = 100
    train.max_skipped_steps = 10  # in a row, their loss or gradients not finite; then the run stops
    train.sample_every_steps = 10_000  # a grid of samples from the EMA weights; 0: never

    config.checkpoint = checkpoint = config_dict.ConfigDict()
    checkpoint.every_steps = 5_000  # the last step is always saved
    checkpoint.keep_last = 2
    checkpoint.keep_every_steps = 0  # keep these for good; 0: none

    config.init = init = config_dict.ConfigDict()
    init.path = ""  # another run's workdir, or an official .pt checkpoint; "": fresh weights
    init.weights = "raw"  # or "ema"
    init.ignore = ()  # parameters to leave fresh: regular expressions over "block/layer/kernel"

    config.mesh = mesh = config_dict.ConfigDict()
    mesh.data = -1  # devices that hold whole copies; -1: all that fsdp leaves
    mesh.fsdp = 1  # devices that parameters, EMA and optimizer state are split over

    config.sample = sample = config_dict.ConfigDict()
    sample.num = 64  # images
    sample.batch_size = 64  # over all devices
    sample.seed = 0  # image i depends on (seed, i) alone
    sample.sampler = "ddim"  # or "ddpm"
    sample.steps = 250  # network evaluations, 1 to diffusion.num_timesteps
    sample.spacing = "timestep"  # of the levels: even in "timestep" (the official), or "log_snr"
    sample.eta = 1.0  # DDIM's noise: 0 deterministic, 1 as much as DDPM
    sample.guidance_scale = 1.0  # 1: none
    sample.label = -1  # the class to draw; -1: image i has class i mod num_classes
    sample.weights = "ema"  # or "raw"
    sample.preview_num = 16  # images in the grids that training draws
    sample.preview_steps = 50  # and their network evaluations
    return config.lock()


_CHOICES = {
    "data.cache": ("none", "host", "device"),
    "model.size": ("S", "B", "L", "H"),
    "model.remat": ("none", "blocks"),
    "model.attention": ("auto", "xla", "cudnn", "pallas", "hopper", "splash"),
    "model.dtype": ("float32", "bfloat16"),
    "mask.kind": ("none", "patch", "block", "crop"),
    "diffusion.schedule": ("linear", "cosine", "shifted_cosine"),
    "diffusion.prediction": ("eps", "x0", "v"),
    "diffusion.loss": ("l2", "l1"),
    "optim.lr_schedule": ("constant", "cosine"),
    "init.weights": ("raw", "ema"),
    "sample.sampler": ("ddim", "ddpm"),
    "sample.spacing": ("timestep", "log_snr"),
    "sample.weights": ("raw", "ema"),
}

# Inclusive; None is no bound.
_RANGES = {
    "seed": (0, 2**31 - 1),
    "sample.seed": (0, 2**31 - 1),
    "data.channels": (1, 12),
    "data.num_threads": (1, None),
    "model.width": (0, None),
    "model.depth": (0, None),
    "model.num_heads": (0, None),
    "model.patch_size": (1, None),
    "model.mlp_ratio": (0.25, None),
    "model.num_classes": (0, None),
    "model.class_dropout": (0, 1),
    "model.dropout": (0, 0.99),
    "mask.ratio": (0, 0.95),
    "mask.block_size": (1, None),
    "mask.crop_size": (1, None),
    "diffusion.num_timesteps": (50, None),
    "optim.lr_peak": (0, None),
    "optim.warmup_steps": (0, None),
    "optim.b1": (0, 0.99999),
    "optim.b2": (0, 0.99999),
    "optim.weight_decay": (0, None),
    "optim.clip_norm": (0, None),
    "optim.accumulate_steps": (1, None),
    "optim.ema_decay": (0, 1),
    "train.num_steps": (1, None),
    "train.batch_size": (1, None),
    "train.log_every_steps": (1, None),
    "train.max_skipped_steps": (1, None),
    "train.sample_every_steps": (0, None),
    "checkpoint.every_steps": (1, None),
    "checkpoint.keep_last": (1, None),
    "checkpoint.keep_every_steps": (0, None),
    "mesh.data": (-1, None),
    "mesh.fsdp": (1, None),
    "sample.num": (1, None),
    "sample.batch_size": (1, None),
    "sample.eta": (0, 1),
    "sample.label": (-1, None),
    "sample.preview_num": (1, None),
}


def validate(config) -> None:
    """Raises ConfigError for the first value that cannot work; needs no device and no data."""
    for field, choices in _CHOICES.items():
        if _get(config, field) not in choices:
            _fail(config, field, f"one of {', '.join(choices)}", choices[0])
    for field, (low, high) in _RANGES.items():
        value = _get(config, field)
        if not (low <= value and (high is None or value <= high)):  # not: nan fits nowhere
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            _fail(config, field, bounds, low if value < low else high)
    _validate_geometry(config)
    _validate_mask(config)
    timesteps = config.diffusion.num_timesteps
    for field in ("sample.steps", "sample.preview_steps"):
        if not 1 <= _get(config, field) <= timesteps:
            _fail(config, field, f"1 to diffusion.num_timesteps, {timesteps}", timesteps)
    if config.train.batch_size % config.optim.accumulate_steps:
        _fail(
            config,
            "optim.accumulate_steps",
            f"a divisor of train.batch_size, {config.train.batch_size}",
            1,
        )
    classes = config.model.num_classes
    if config.sample.label >= classes:
        _fail(config, "sample.label", f"below model.num_classes, {classes}", -1)
    if config.sample.guidance_scale != 1 and not classes:
        _fail(
            config,
            "sample.guidance_scale",
            "1 for a model without classes (model.num_classes is 0)",
            1,
        )


def validate_devices(config, num_devices: int, mode: str) -> None:
    """Raises ConfigError where the mesh or the batch of `mode` does not go with `num_devices`."""
    fsdp, data = config.mesh.fsdp, config.mesh.data
    if num_devices % fsdp:
        _fail(config, "mesh.fsdp", f"a divisor of the number of devices, {num_devices}", 1)
    if data != -1 and data * fsdp != num_devices:
        _fail(
            config,
            "mesh.data",
            f"{num_devices // fsdp}, so that mesh.data x mesh.fsdp is the "
            f"number of devices, {num_devices}",
            -1,
        )
    if mode == "sample":
        field, multiple, of = "sample.batch_size", num_devices, "the number of devices"
    else:
        field, of = "train.batch_size", "devices x optim.accumulate_steps"
        multiple = num_devices * config.optim.accumulate_steps
    value = _get(config, field)
    if value % multiple:
        near = max(round(value / multiple), 1) * multiple
        _fail(config, field, f"a multiple of {multiple}, {of}", near)


def to_json(config) -> str:
    """The config as indented JSON."""
    return json.dumps(config.to_dict(), indent=2)


def load_json(path: str | pathlib.Path) -> config_dict.ConfigDict:
    """The config that `to_json` wrote at `path`."""
    return from_dict(json.loads(pathlib.Path(path).read_text()))


def from_dict(stored: dict) -> config_dict.ConfigDict:
    """A config from what `to_dict` gave, lists for tuples; fields since added have defaults."""
    config = default_config()
    with config.unlocked():
        for key, value in stored.items():
            if isinstance(value, dict):
                known = {k: _as_stored(config[key].get(k), v) for k, v in value.items()}
                config[key].update(known)
            else:
                config[key] = value
    return config


# What another value of means other parameters, or other meaning of the same parameters.
_ARCHITECTURE = (
    "data.image_size", "data.channels", "model.size", "model.width", "model.depth",
    "model.num_heads", "model.patch_size", "model.mlp_ratio", "model.qkv_bias",
    "model.mlp_time_embed", "model.num_classes", "diffusion.schedule", "diffusion.num_timesteps",
    "diffusion.prediction",
)  # fmt: skip


def differences(config, stored, fields=None) -> list[str]:
    """Fields in which two configs differ, as "field (stored value there, value here)"."""
    fields = _leaves(config) if fields is None else fields
    return [
        f"{field} ({_get(stored, field)} there, {_get(config, field)} here)"
        for field in fields
        if _get(stored, field) != _get(config, field)
    ]


def check_same_architecture(config, stored, where: str) -> None:
    """Raises ConfigError where the run stored at `where` has another architecture than `config`."""
    different = [f for f in _ARCHITECTURE if _get(config, f) != _get(stored, f)]
    if different:
        flags = " ".join(f"--config.{f}={_quoted(_get(stored, f))}" for f in different)
        raise ConfigError(
            f"the checkpoint in {where} has another architecture: "
            f"{', '.join(differences(config, stored, different))}; type {flags} to use it, or "
            f"another --workdir to start afresh"
        )


def _validate_geometry(config):
    patch = config.model.patch_size
    size = config.data.image_size
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        _fail(config, "data.image_size", "two positive numbers, (height, width)", (64, 64))
    if any(side % patch for side in size):
        good = next(p for p in range(patch, 0, -1) if not any(side % p for side in size))
        _fail(config, "model.patch_size", f"a divisor of data.image_size, {tuple(size)}", good)
    width, _, heads = dimensions(config.model)
    if width % heads:
        good = next(h for h in range(heads, 0, -1) if width % h == 0)
        _fail(config, "model.num_heads", f"a divisor of the width, {width}", good)


def _validate_mask(config):
    mask = config.mask
    grid = grid_shape(config.data.image_size, config.model.patch_size)
    if mask.kind == "block" and any(side % mask.block_size for side in grid):
        good = next(b for b in range(mask.block_size, 0, -1) if not any(side % b for side in grid))
        _fail(
            config, "mask.block_size", f"a divisor of the patch grid, {grid[0]} x {grid[1]}", good
        )
    if mask.kind == "crop" and mask.crop_size > min(grid):
        _fail(
            config,
            "mask.crop_size",
            f"at most the patch grid's shorter side, {min(grid)}",
            min(grid),
        )


def _fail(config, field, expected, suggestion):
    raise ConfigError(
        f"{field} is {_get(config, field)!r}; expected {expected}; "
        f"type --config.{field}={_quoted(suggestion)}"
    )


def _quoted(value):
    return f'"{tuple(value)}"' if isinstance(value, (tuple, list)) else value


def _get(config, field):
    for name in field.split("."):
        config = config[name]
    return tuple(config) if isinstance(config, list) else config


def _leaves(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, config_dict.ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _as_stored(default, value):
    return tuple(value) if isinstance(default, tuple) else value
