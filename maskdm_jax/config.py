"""The config: one table of fields, and the checks made before any work.

A file in configs/ starts from `default_config`, sets some fields, and returns the config.
`--config.field=value` on the command line overrides the file. An unknown field is an error; a value
that cannot work raises `ConfigError`, one sentence with the field's name and what to type.
"""

import json
import pathlib
from collections.abc import Iterable

from ml_collections import config_dict

from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import (
    COUNT,
    COUNT_OR_0,
    FLAG,
    FREE,
    MEANING,
    NAMES,
    NON_NEGATIVE,
    NUMBER,
    SEED,
    SHAPE,
    SIZE,
    TEXT,
    UPDATE,
    Field,
    Role,
    choice,
    number,
    one_of,
    quoted,
    whole,
)
from maskdm_jax.model.sizes import SIZES, Dimensions, dimensions, grid_shape

# fmt: off
FIELDS: dict[str, Field] = {
    "seed": Field(0, SEED, UPDATE,
        "determines the weights, the order of the examples, the masks and the noise"),

    "data.name": Field("", TEXT, UPDATE,
        "a data set written by maskdm_jax.data.prepare, or any TFDS set with images"),
    "data.dir": Field("~/tensorflow_datasets", TEXT, FREE, "where TFDS data sets are stored"),
    "data.split": Field("train", TEXT, UPDATE, "the part of the data set to train on"),
    "data.image_size": Field((64, 64), SIZE, SHAPE, "height, width in pixels"),
    "data.channels": Field(3, whole(1, 12), SHAPE, "channels of the prepared set's images"),
    "data.flip": Field(False, FLAG, UPDATE, "flip each image left-right with probability 1/2"),
    "data.cache": Field("host", one_of("none", "host", "device"), FREE,
        "storage for decoded uint8 images: none (decode in every epoch), host (a file mapped into "
        "memory and shared by processes) or device (the accelerator's memory)"),
    "data.num_threads": Field(16, COUNT, FREE, "threads that decode images"),

    "model.size": Field("B", one_of(*SIZES), SHAPE, "width, depth and heads, see model/sizes.py"),
    "model.width": Field(0, COUNT_OR_0, SHAPE, "channels of a token; 0: from model.size"),
    "model.depth": Field(0, COUNT_OR_0, SHAPE,
        "blocks; 0: from model.size; 12 and 13 both build 6 + 1 + 6"),
    "model.num_heads": Field(0, COUNT_OR_0, MEANING, "attention heads; 0: from model.size"),
    "model.patch_size": Field(4, COUNT, SHAPE, "pixels on a patch's side"),
    "model.mlp_ratio": Field(4.0, number(0.25), SHAPE, "hidden width of the MLP over D"),
    "model.qkv_bias": Field(False, FLAG, SHAPE, "biases on q and v"),
    "model.mlp_time_embed": Field(False, FLAG, SHAPE,
        "two Linear layers after the timestep's sinusoids"),
    "model.num_classes": Field(0, COUNT_OR_0, SHAPE, "0: unconditional"),
    "model.class_dropout": Field(0.1, number(0, 1), UPDATE,
        "probability of hiding the class in training, which guidance needs"),
    "model.dropout": Field(0.0, number(0, 0.99), UPDATE,
        "of the attention's output, the MLP's hidden layer and its output"),
    "model.remat": Field("none", one_of("none", "blocks"), UPDATE,
        "blocks: recompute each block in the backward pass; less memory"),
    "model.attention": Field("auto",
        one_of("auto", "xla", "cudnn", "pallas", "hopper", "splash"), UPDATE,
        "the kernel; auto: the fastest that the device and the shapes allow"),
    "model.dtype": Field("bfloat16", one_of("float32", "bfloat16"), UPDATE,
        "of matmuls and activations; parameters and statistics are float32"),

    "mask.kind": Field("none", one_of("none", "patch", "block", "crop"), UPDATE,
        "what is hidden: single patches, blocks of patches, or all outside a window"),
    "mask.ratio": Field(0.9, number(0, 0.95), UPDATE,
        "share of the patches that are hidden; patch and block"),
    "mask.block_size": Field(4, COUNT, UPDATE, "patches on a block's side; divides the patch grid"),
    "mask.crop_size": Field(16, COUNT, UPDATE, "patches on the visible window's side; crop"),

    "diffusion.schedule": Field("cosine", one_of("linear", "cosine", "shifted_cosine"), MEANING,
        "the noise schedule"),
    "diffusion.num_timesteps": Field(1000, whole(50), MEANING, "T"),
    "diffusion.prediction": Field("eps", one_of("eps", "x0", "v"), MEANING,
        "what the network outputs"),
    "diffusion.loss": Field("l2", one_of("l2", "l1"), UPDATE,
        "mean of squared or of absolute errors"),

    "optim.lr_peak": Field(2e-4, NON_NEGATIVE, UPDATE, "the highest learning rate"),
    "optim.warmup_steps": Field(0, COUNT_OR_0, UPDATE, "linear, from 0"),
    "optim.lr_schedule": Field("constant", one_of("constant", "cosine"), UPDATE,
        "after the warm-up; cosine: to 0 at train.num_steps"),
    "optim.b1": Field(0.99, number(0, 0.99999), UPDATE, "AdamW's decay of the first moment"),
    "optim.b2": Field(0.99, number(0, 0.99999), UPDATE, "AdamW's decay of the second moment"),
    "optim.weight_decay": Field(0.03, NON_NEGATIVE, UPDATE, "on every parameter"),
    "optim.clip_norm": Field(0.0, NON_NEGATIVE, UPDATE,
        "of the global gradient norm; 0: no clipping"),
    "optim.accumulate_steps": Field(1, COUNT, UPDATE,
        "parts a batch is split into, computed one after another to save memory"),
    "optim.ema": Field("decay", one_of("decay", "power"), SHAPE,
        "the averaged weights: one EMA, or EDM2's power-function averages of any length"),
    "optim.ema_snapshot_steps": Field(1_000, COUNT, UPDATE,
        "power: snapshots from which other lengths are made; all are kept"),
    "optim.ema_decay": Field(0.999, number(0, 1), UPDATE, "of the averaged weights"),
    "optim.ema_ramp": Field(True, FLAG, UPDATE,
        "copy for 100 updates, then decay 1 - (1 + n)^(-2/3) up to ema_decay"),

    "train.num_steps": Field(100_000, COUNT, UPDATE, "updates"),
    "train.batch_size": Field(256, COUNT, UPDATE, "images, over all devices and hosts"),
    "train.dry_run": Field(False, FLAG, FREE,
        "print the step's memory and the batches that fit, and train nothing"),
    "train.log_every_steps": Field(100, COUNT, FREE, "a record in metrics.jsonl"),
    "train.max_skipped_steps": Field(10, COUNT, FREE,
        "updates in a row whose loss or gradients are not finite, before the run stops"),
    "train.sample_every_steps": Field(10_000, COUNT_OR_0, FREE,
        "a grid of samples from the EMA weights; 0: never"),

    "checkpoint.every_steps": Field(5_000, COUNT, FREE, "the last step is always saved"),
    "checkpoint.keep_last": Field(2, COUNT, FREE, "newest checkpoints to keep"),
    "checkpoint.keep_every_steps": Field(0, COUNT_OR_0, FREE, "keep all multiples too; 0: none"),

    "init.path": Field("", TEXT, UPDATE,
        "another run's workdir, or an official .pt checkpoint; empty: fresh weights"),
    "init.weights": Field("raw", one_of("raw", "ema"), UPDATE, "which of its weights"),
    "init.ignore": Field((), NAMES, UPDATE,
        'parameters to leave fresh: regular expressions over "block/layer/kernel"'),
    "init.allow": Field((), NAMES, UPDATE,
        "fields in which that run may differ even though they change the weights' meaning"),

    "mesh.data": Field(-1, whole(-1), FREE,
        "whole copies of the state; -1: the number of devices / mesh.fsdp"),
    "mesh.fsdp": Field(1, COUNT, FREE,
        "devices that parameters, EMA and optimizer state are split over"),

    "sample.num": Field(64, COUNT, FREE, "images"),
    "sample.batch_size": Field(64, COUNT, FREE, "images at a time, over all devices"),
    "sample.seed": Field(0, SEED, FREE, "image i depends on (seed, i) alone"),
    "sample.sampler": Field("ddim", one_of("ddim", "ddpm"), FREE, "see diffusion/samplers.py"),
    "sample.spacing": Field("timestep", one_of("timestep", "log_snr"), FREE,
        "levels spaced evenly in t (as the official code has them) or in log(signal / noise)"),
    "sample.steps": Field(250, COUNT, FREE, "1 to diffusion.num_timesteps"),
    "sample.eta": Field(1.0, number(0, 1), FREE,
        "DDIM's noise: 0 is deterministic, 1 adds as much as DDPM"),
    "sample.guidance_scale": Field(1.0, NUMBER, FREE, "1: no guidance"),
    "sample.label": Field(-1, whole(-1), FREE,
        "the class to draw; -1: image i has class i mod num_classes"),
    "sample.weights": Field("ema", one_of("ema", "raw"), FREE, "which weights to draw with"),
    "sample.ema_std": Field(0.0, number(0, 0.28), FREE,
        "with optim.ema=power, the average's standard deviation over the training time; 0: 0.05"),
    "sample.preview_num": Field(16, COUNT, FREE, "images in the grids that training draws"),
    "sample.preview_steps": Field(50, COUNT, FREE, "sampler steps for those grids"),

    "eval.checkpoints": Field("newest", TEXT, FREE,
        "what --mode=evaluate scores: newest, all, a step, or a range such as 1000:9000"),
    "eval.num": Field(10_000, whole(2), FREE, "samples to score"),
    "eval.metrics": Field(
        ("fid", "kid", "precision_recall", "density_coverage", "memorisation", "swd"), NAMES, FREE,
        "see docs/scores.md; also inception_score"),
    "eval.features": Field(2048, choice(2048, 768, 192, 64), FREE,
        "features that fid and its like compare"),
    "eval.inception_weights": Field("", TEXT, FREE,
        "file of the feature network; empty: pytorch-fid's, downloaded once"),
    "eval.reference": Field("", TEXT, FREE,
        "images or statistics to compare with; empty: the training images"),
    "eval.heldout_split": Field("test", TEXT, FREE,
        "split for held-out loss, floor and memorisation; empty: none"),
    "eval.ema_stds": Field("", TEXT, FREE,
        "values of sample.ema_std to score one after another, such as 0.02,0.05,0.1"),
    "eval.every_steps": Field(0, COUNT_OR_0, FREE, "scores in training, from EMA; 0: never"),
    "eval.num_in_training": Field(1_000, whole(2), FREE,
        "samples for those, drawn in sample.preview_steps"),
}
# fmt: on


def default_config() -> config_dict.ConfigDict:
    """Every field with its default.

    A default never changes: it fills the fields missing from configs stored by older versions. A
    new field's default is therefore what the code did before the field existed.
    """
    config = config_dict.ConfigDict()
    for name, field in FIELDS.items():
        group, _, leaf = name.rpartition(".")
        if group and group not in config:
            config[group] = config_dict.ConfigDict()
        (config[group] if group else config)[leaf] = field.default
    return config.lock()


def validate(config) -> None:
    """Raises ConfigError for the first value that cannot work; needs no device and no data."""
    for name, field in FIELDS.items():
        value = get(config, name)
        if not field.kind.accepts(value):
            _fail(config, name, field.kind.expected, field.kind.nearest(value, field.default))
    _validate_geometry(config)
    _validate_mask(config)
    _validate_allowed(config)
    timesteps = config.diffusion.num_timesteps
    for name in ("sample.steps", "sample.preview_steps"):
        if get(config, name) > timesteps:
            _fail(config, name, f"1 to diffusion.num_timesteps, {timesteps}", timesteps)
    batch, parts = config.train.batch_size, "optim.accumulate_steps"
    if batch % config.optim.accumulate_steps:
        _fail(config, parts, f"a divisor of train.batch_size, {batch}", 1)
    classes = config.model.num_classes
    if config.sample.label >= classes:
        _fail(config, "sample.label", f"below model.num_classes, {classes}", -1)
    if config.sample.guidance_scale != 1 and not classes:
        expected = "1 for a model without classes (model.num_classes is 0)"
        _fail(config, "sample.guidance_scale", expected, 1)


def validate_devices(config, num_devices: int, mode: str) -> None:
    """Raises ConfigError if the mesh, or the batch for `mode`, does not suit `num_devices`."""
    fsdp, data = config.mesh.fsdp, config.mesh.data
    if num_devices % fsdp:
        _fail(config, "mesh.fsdp", f"a divisor of the number of devices, {num_devices}", 1)
    if data != -1 and data * fsdp != num_devices:
        expected = (
            f"{num_devices // fsdp}, since mesh.data x mesh.fsdp is the number of devices, "
            f"{num_devices}"
        )
        _fail(config, "mesh.data", expected, -1)
    if mode in ("sample", "evaluate"):
        name, multiple, of = "sample.batch_size", num_devices, "the number of devices"
    else:
        name, of = "train.batch_size", "devices x optim.accumulate_steps"
        multiple = num_devices * config.optim.accumulate_steps
    value = get(config, name)
    if value % multiple:
        near = max(round(value / multiple), 1) * multiple
        _fail(config, name, f"a multiple of {multiple}, {of}", near)


def to_json(config) -> str:
    """The config as indented JSON."""
    return json.dumps(config.to_dict(), indent=2)


def load_json(path: str | pathlib.Path) -> config_dict.ConfigDict:
    """The config that `to_json` wrote at `path`."""
    return from_dict(json.loads(pathlib.Path(path).read_text()))


def from_dict(stored: dict) -> config_dict.ConfigDict:
    """A config from a stored `to_dict`, with lists for tuples; missing fields get defaults."""
    config = default_config()
    with config.unlocked():
        for key, value in stored.items():
            if isinstance(value, dict):
                known = {k: _as_stored(config[key].get(k), v) for k, v in value.items()}
                config[key].update(known)
            else:
                config[key] = value
    return config


def differences(config, stored, roles: Iterable[Role] = tuple(Role)) -> list[str]:
    """Names of the fields with one of `roles` in which two configs differ."""
    return [
        name
        for name, field in FIELDS.items()
        if field.role in roles and resolved(config, name) != resolved(stored, name)
    ]


def described(config, stored, names: Iterable[str]) -> str:
    """Those fields' values in both configs, in words."""
    return ", ".join(
        f"{n} ({resolved(stored, n)} there, {resolved(config, n)} here)" for n in names
    )


def as_flags(config, names: Iterable[str]) -> str:
    """The flags that give those fields `config`'s values."""
    return " ".join(f"--config.{name}={quoted(resolved(config, name))}" for name in names)


def check_same_architecture(config, stored, where: str) -> None:
    """Raises ConfigError if the run stored at `where` differs from `config` in architecture."""
    names = differences(config, stored, (SHAPE, MEANING))
    if names:
        raise ConfigError(
            f"the checkpoint in {where} has a different architecture: "
            f"{described(config, stored, names)}; type {as_flags(stored, names)} to use it, or "
            "another --workdir to start afresh"
        )


def get(config, name: str):
    """The value of a field by its dotted name; lists are tuples."""
    for part in name.split("."):
        config = config[part]
    return tuple(config) if isinstance(config, list) else config


def resolved(config, name: str):
    """As `get`, but with dimensions of 0 replaced by those of model.size."""
    group, _, leaf = name.rpartition(".")
    if group == "model" and leaf in Dimensions._fields:
        return getattr(dimensions(config.model), leaf)
    return get(config, name)


def _validate_geometry(config):
    patch, size = config.model.patch_size, config.data.image_size
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
        expected = f"a divisor of the patch grid, {grid[0]} x {grid[1]}"
        _fail(config, "mask.block_size", expected, good)
    if mask.kind == "crop" and mask.crop_size > min(grid):
        expected = f"at most the patch grid's shorter side, {min(grid)}"
        _fail(config, "mask.crop_size", expected, min(grid))


def _validate_allowed(config):
    known = one_of(*(name for name, field in FIELDS.items() if field.role in (SHAPE, MEANING)))
    near = tuple(
        name if known.accepts(name) else known.nearest(name, "diffusion.schedule")
        for name in config.init.allow
    )
    if near != tuple(config.init.allow):
        expected = "fields that fix the shape or the meaning of the parameters"
        _fail(config, "init.allow", expected, near)


def _fail(config, name, expected, suggestion):
    raise ConfigError(
        f"{name} is {get(config, name)!r}; expected {expected}; "
        f"type --config.{name}={quoted(suggestion)}"
    )


def _as_stored(default, value):
    return tuple(value) if isinstance(default, tuple) else value
