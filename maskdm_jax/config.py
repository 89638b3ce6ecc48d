"""The config: its fields, see `field_table`, and the checks made before any work.

A file in configs/ starts from `default_config`, sets some fields, and returns the config.
`--config.field=value` on the command line overrides the file. An unknown field is an error; a value
that cannot work raises `ConfigError`, one sentence with the field's name and what to type.
"""

import json
import pathlib
from collections.abc import Iterable

from ml_collections import config_dict

from maskdm_jax.errors import ConfigError, OtherRecipe
from maskdm_jax.field_table import FIELDS
from maskdm_jax.fields import MEANING, SHAPE, Role, as_tuples, one_of, quoted
from maskdm_jax.model.sizes import Dimensions, batch_multiple, dimensions, grid_shape
from maskdm_jax.run import files

# Fields that came after the first scores and folders of samples were named by hashes.
_LATER = (
    "model.wavelet", "model.coarse", "diffusion.framework", "diffusion.edm_mean",
    "diffusion.edm_std", "diffusion.sigma_data", "diffusion.sigma_min", "diffusion.sigma_max",
    "diffusion.rho", "diffusion.coarse_every", "sample.recompute_eps", "sample.threshold",
    "sample.guidance_interval", "sample.strength",
)  # fmt: skip
# Fields of `diffusion` that one framework uses; with another one nothing reads or compares them.
_FRAMEWORK_FIELDS = {
    "ddpm": ("schedule", "num_timesteps", "prediction", "draw", "draw_mean", "draw_std"),
    "edm": ("edm_mean", "edm_std", "sigma_data", "sigma_min", "sigma_max", "rho"),
}
# What the fields of a group build, in words; those of the others build the architecture.
_BUILDS = {"diffusion": "noise process", "optim": "optimizer"}


class FieldError(ConfigError):
    """A value of a field that cannot work.

    Attributes:
      name: the field's.
      problem: the value, and what is expected, in words.
      suggestion: a value that works.
    """

    def __init__(self, name: str, problem: str, suggestion):
        super().__init__(f"{problem}; type --config.{name}={quoted(suggestion)}")
        self.name, self.problem, self.suggestion = name, problem, suggestion


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
    """Raises FieldError for the first value that cannot work; needs no device and no data.

    The config is that of one phase; `phases.validate` checks a run's.
    """
    validate_values(config)
    _validate_geometry(config)
    _validate_mask(config)
    _validate_allowed(config)
    _validate_map(config)
    if config.diffusion.loss != "l2" and config.diffusion.loss_weight != "uniform":
        expected = "uniform with diffusion.loss=l1: the weights are defined for squared errors"
        _fail(config, "diffusion.loss_weight", expected, "uniform")
    _validate_levels(config)
    batch, parts = config.train.batch_size, "optim.accumulate_steps"
    if batch % config.optim.accumulate_steps:
        _fail(config, parts, f"a divisor of train.batch_size, {batch}", 1)
    classes = config.model.num_classes
    if config.sample.label >= classes:
        _fail(config, "sample.label", f"below model.num_classes, {classes}", -1)
    if config.sample.guidance_scale != 1 and not classes:
        expected = "1 for a model without classes (model.num_classes is 0)"
        _fail(config, "sample.guidance_scale", expected, 1)
    if config.sample.guidance_scale != 1 and config.model.class_dropout == 0:
        expected = "1 for a model that never trained without the class (model.class_dropout is 0)"
        _fail(config, "sample.guidance_scale", expected, 1)


def validate_values(config) -> None:
    """Raises FieldError for the first value that its field does not take."""
    for name in FIELDS:
        check_field(name, get(config, name))


def check_field(name: str, value) -> None:
    """Raises FieldError if the field `name` does not take `value`."""
    kind, default = FIELDS[name].kind, FIELDS[name].default
    if not kind.accepts(value):
        problem = f"{name} is {value!r}; expected {kind.expected}"
        raise FieldError(name, problem, kind.nearest(value, default))


def validate_devices(config, num_devices: int, mode: str) -> None:
    """Raises FieldError if the mesh, or the batch for `mode`, does not suit `num_devices`."""
    fsdp, data = config.mesh.fsdp, config.mesh.data
    if num_devices % fsdp:
        _fail(config, "mesh.fsdp", f"a divisor of the number of devices, {num_devices}", 1)
    if data != -1 and data * fsdp != num_devices:
        expected = (
            f"{num_devices // fsdp}, since mesh.data x mesh.fsdp is the number of devices, "
            f"{num_devices}"
        )
        _fail(config, "mesh.data", expected, -1)
    scores = mode == "train" and config.eval.every_steps and config.sample.batch_size % num_devices
    if mode in ("sample", "evaluate") or scores:
        name, multiple, of = "sample.batch_size", num_devices, "the number of devices"
    else:
        name, of = "train.batch_size", "devices x optim.accumulate_steps"
        multiple = batch_multiple(config, num_devices)
        of += " x diffusion.coarse_every" if config.model.coarse else ""
    value = get(config, name)
    if value % multiple:
        near = max(round(value / multiple), 1) * multiple
        _fail(config, name, f"a multiple of {multiple}, {of}", near)


def to_json(config) -> str:
    """The config as indented JSON."""
    return json.dumps(config.to_dict(), indent=2)


def load_json(path: str | pathlib.Path) -> config_dict.ConfigDict:
    """The config that `to_json` wrote at `path`."""
    return from_dict(json.loads(files.as_place(path).read_text()))


def from_dict(stored: dict) -> config_dict.ConfigDict:
    """A config from a stored `to_dict`, with lists for tuples; missing fields get defaults."""
    config = default_config()
    with config.unlocked():
        for key, value in stored.items():
            if isinstance(value, dict):
                known = {k: _as_stored(config[key].get(k), v) for k, v in value.items()}
                config[key].update(known)
            else:
                config[key] = as_tuples(value)
    return config


def whole_images(config) -> config_dict.ConfigDict:
    """The config of drawing and scoring: a copy that hides nothing, whatever training hides.

    Its network has no parameters for pooled tokens, which whole images do not have.
    """
    config = config.copy_and_resolve_references()
    config.mask.update(kind="none", hidden="drop")
    return config


def differences(config, stored, roles: Iterable[Role] = tuple(Role)) -> list[str]:
    """Names of the fields with one of `roles` in which two configs differ, and that one uses."""
    return [
        name
        for name, field in FIELDS.items()
        if field.role in roles
        and (is_used(config, name) or is_used(stored, name))
        and resolved(config, name) != resolved(stored, name)
    ]


def framework_of(name: str) -> str | None:
    """The only diffusion.framework that uses the field `name`; None if all do."""
    group, _, leaf = name.rpartition(".")
    of_leaf = (framework for framework, leaves in _FRAMEWORK_FIELDS.items() if leaf in leaves)
    return next(of_leaf, None) if group == "diffusion" else None


def without_later(fields: dict) -> dict:
    """Those fields, without the ones of a later version that are at their default.

    A hash of the result is that of the version without them, so what it names is still found.
    """
    return {n: x for n, x in fields.items() if n not in _LATER or x != FIELDS[n].default}


def is_used(config, name: str) -> bool:
    """Whether the config's diffusion.framework uses the field `name`."""
    return framework_of(name) in (None, config.diffusion.framework)


def described(config, stored, names: Iterable[str]) -> str:
    """Those fields' values in both configs, in words."""
    return ", ".join(
        f"{n} ({resolved(stored, n)} there, {resolved(config, n)} here)" for n in names
    )


def as_flags(config, names: Iterable[str]) -> str:
    """The flags that give those fields `config`'s values; none for a field that it does not use."""
    used = (name for name in names if is_used(config, name))
    return " ".join(f"--config.{name}={quoted(resolved(config, name))}" for name in used)


def check_same_architecture(
    config, stored, where: str, instead: str = "another --workdir to start afresh"
) -> None:
    """Checks that `config` builds the state of the run that is stored at `where`.

    Args:
      config: as typed.
      stored: the run's.
      where: the run's folder.
      instead: what to type for another run than that one.

    Raises:
      OtherRecipe: if the network, its noise process or the optimizer differs.
    """
    names = differences(config, stored, (SHAPE, MEANING))
    if names:
        groups = (name.partition(".")[0] for name in names)
        what = " and ".join(dict.fromkeys(_BUILDS.get(group, "architecture") for group in groups))
        raise OtherRecipe(
            f"the checkpoint in {where} has a different {what}: "
            f"{described(config, stored, names)}; type {as_flags(stored, names)} to use it, or "
            f"{instead}",
            stored,
            names,
        )


def block_map(text: str) -> dict[str, str]:
    """The block of the other run for each block that `init.map` names; "-" for a fresh one."""
    blocks = {}
    for side in text.split():
        kind, _, numbers = side.partition("=")
        for i, number in enumerate(numbers.split(",")):
            blocks[f"{kind}_{i}"] = number if number == "-" else f"{kind}_{number}"
    return blocks


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
    if config.model.wavelet == "haar":
        _validate_haar(config)
    if any(side % patch for side in size):
        good = next(p for p in range(patch, 0, -1) if not any(side % p for side in size))
        _fail(config, "model.patch_size", f"a divisor of data.image_size, {tuple(size)}", good)
    width, _, heads = dimensions(config.model)
    if width % heads:
        good = next(h for h in range(heads, 0, -1) if width % h == 0)
        _fail(config, "model.num_heads", f"a divisor of the width, {width}", good)


def _validate_haar(config):
    patch, size = config.model.patch_size, config.data.image_size
    if any(side % 2 for side in size):
        expected = f"none for images with an odd side, data.image_size {tuple(size)}"
        _fail(config, "model.wavelet", expected, "none")
    if patch % 2:
        # An even divisor, which exists: 2 divides both sides.
        good = max(p for p in range(2, patch + 2, 2) if not any(side % p for side in size))
        _fail(config, "model.patch_size", "an even number with model.wavelet=haar", good)


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
    if mask.hidden == "pool" and mask.kind != "block":
        expected = f"drop, since mask.kind is {mask.kind!r} and only blocks can be pooled"
        _fail(config, "mask.hidden", expected, "drop")
    if mask.hidden == "pool" and mask.block_size % mask.pool_size:
        divisors = [d for d in range(1, mask.block_size + 1) if mask.block_size % d == 0]
        good = min(divisors, key=lambda d: abs(d - mask.pool_size))
        _fail(config, "mask.pool_size", f"a divisor of mask.block_size, {mask.block_size}", good)


def _validate_levels(config):
    diffusion = config.diffusion
    if diffusion.framework == "edm":
        low, high = diffusion.sigma_min, diffusion.sigma_max
        if low >= high:
            default = FIELDS["diffusion.sigma_max"].default
            good = default if low < default else 2 * low
            _fail(config, "diffusion.sigma_max", f"above diffusion.sigma_min, {low}", good)
        return
    timesteps = diffusion.num_timesteps
    for name in ("sample.steps", "sample.preview_steps"):
        if get(config, name) > timesteps:
            _fail(config, name, f"1 to diffusion.num_timesteps, {timesteps}", timesteps)


def _validate_allowed(config):
    known = one_of(*(name for name, field in FIELDS.items() if field.role in (SHAPE, MEANING)))
    near = tuple(
        name if known.accepts(name) else known.nearest(name, "diffusion.schedule")
        for name in config.init.allow
    )
    if near != tuple(config.init.allow):
        expected = "fields that fix the shape or the meaning of the parameters"
        _fail(config, "init.allow", expected, near)


def _validate_map(config):
    num_skips = dimensions(config.model).depth // 2
    sides = [side.partition("=")[::2] for side in config.init.map.split()]
    if all(len(numbers.split(",")) == num_skips for _, numbers in sides):
        return
    fitted = []
    for kind, numbers in sides:
        numbers = numbers.split(",")
        spread = [numbers[i * len(numbers) // num_skips] for i in range(num_skips)]
        fitted.append(f"{kind}={','.join(spread)}")
    expected = f"lists of {num_skips}, the blocks on each side of this model's middle one"
    _fail(config, "init.map", expected, " ".join(fitted) if num_skips else "")


def _fail(config, name, expected, suggestion):
    raise FieldError(name, f"{name} is {get(config, name)!r}; expected {expected}", suggestion)


def _as_stored(default, value):
    return as_tuples(value) if isinstance(default, tuple) else value
