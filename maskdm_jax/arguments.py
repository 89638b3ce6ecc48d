"""What the Python interface is given: changed fields and arrays, checked.

An error names what was given, what is expected, and what to type in Python.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from maskdm_jax.config import FIELDS, check_field
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import nearest_word


def change(config, fields: Mapping[str, object]) -> None:
    """Sets fields of `config` by their dotted names.

    Raises:
      ConfigError: for a name that is no field, or a value that the field does not take.
    """
    for name, value in fields.items():
        if name not in FIELDS:
            near = nearest_word(name, FIELDS) or "model.dtype"
            raise ConfigError(
                f"fields names {name!r}, which is no field of the config; expected one of those in "
                f"maskdm_jax/field_table.py; type {near!r}"
            )
        value = tuple(value) if isinstance(value, list) else value
        value = value.item() if isinstance(value, np.generic) else value
        check_field(name, value)
        config.update_from_flattened_dict({name: value})


@contextlib.contextmanager
def said_in_python(function: Callable) -> Iterator[None]:
    """Turns the flags that a ConfigError tells to type into arguments of `function`."""
    arguments = inspect.signature(function).parameters

    def as_argument(match):
        name, text = match[1], match[2].strip("\"'")
        value = FIELDS[name].kind.read(text) if name in FIELDS else text
        value = value if name in FIELDS or not text.isdecimal() else int(text)
        leaf = name.rpartition(".")[2]
        return f"{leaf}={value!r}" if leaf in arguments else f"fields={{{name!r}: {value!r}}}"

    try:
        yield
    except ConfigError as error:
        said = re.sub(r"--(?:config\.)?([a-z_.]+)=(\"[^\"]*\"|[^\s,;]+)", as_argument, str(error))
        raise ConfigError(said) from error.__cause__


def floats(name: str, value: ArrayLike) -> jax.Array:
    """`value` as float32; refuses integers, which are pixels of 0 to 255."""
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ConfigError(
            f"{name} has dtype {value.dtype}; expected floats, of pixels in [-1, 1]; type "
            f"{name} / 127.5 - 1 for pixels of 0 to 255"
        )
    return value.astype(jnp.float32)


def pixels(name: str, value: ArrayLike, image_shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 images [M, H, W, C] from `value`, [H, W, C] or [M, H, W, C]."""
    value = np.asarray(value)
    value = value[None] if value.ndim == 3 else value
    check_shape(name, value, ("M", *image_shape))
    if value.dtype != np.uint8 or not len(value):
        raise ConfigError(
            f"{name} has dtype {value.dtype} and {len(value)} images; expected uint8 pixels of 0 "
            f"to 255; type np.rint(({name}.clip(-1, 1) + 1) * 127.5).astype(np.uint8) for floats "
            "in [-1, 1]"
        )
    return value


def check_shape(name: str, array: ArrayLike, expected: tuple[int | str, ...]) -> None:
    """Refuses an array whose shape is not `expected`, in which letters stand for any size."""
    found = np.shape(array)
    if len(found) != len(expected) or any(
        a != b for a, b in zip(found, expected, strict=True) if not isinstance(b, str)
    ):
        shape = ", ".join(map(str, expected))
        raise ConfigError(f"{name} has shape {list(found)}; expected [{shape}]; type {name} so")


def ids(name: str, values: ArrayLike, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Ints of 0 .. count - 1 as int32 of `shape`; one int stands for all."""
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer) or values.shape not in ((), shape):
        raise ConfigError(
            f"{name} is {values.dtype} of shape {list(values.shape)}; expected an int, or ints of "
            f"shape {list(shape)}; type {name}=0"
        )
    if values.size and not 0 <= values.min() <= values.max() < count:
        bad = int(values.min() if values.min() < 0 else values.max())
        raise ConfigError(f"{name} holds {bad}; expected 0 to {count - 1}; type {name}={count - 1}")
    return np.broadcast_to(values, shape).astype(np.int32)


def sigmas(name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers above 0 as float32 of `shape`; one number stands for all."""
    values = np.asarray(values)
    if values.dtype.kind not in "iuf" or values.shape not in ((), shape):
        raise ConfigError(
            f"{name} is {values.dtype} of shape {list(values.shape)}; expected a float, or floats "
            f"of shape {list(shape)}, since diffusion.framework is edm; type {name}=1.0"
        )
    found = values.astype(np.float32)
    good = (found > 0) & np.isfinite(found)
    if not good.all():
        raise ConfigError(
            f"{name} holds {values[~good].flat[0]}; expected floats above 0, since "
            f"diffusion.framework is edm; type {name}=1.0"
        )
    return np.broadcast_to(found, shape)
