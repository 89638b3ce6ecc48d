"""PyTorch's files of tensors, read and written without PyTorch.

A `.pt` file is a zip archive. Its pickle, NAME/data.pkl, stands for each tensor as a storage (the
type of its numbers, and a key), an offset, a shape and strides; NAME/data/KEY holds the numbers.
Before version 1.6, PyTorch wrote the pickle and the numbers one after another into one file.

A pickle can name any function of any module, to be called when it is loaded. The unpickler here
knows the names that tensors need and no other, so it runs nothing that a file brings along.
"""

import collections
import dataclasses
import functools
import io
import math
import pickle
import struct
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from maskdm_jax.run import files

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_STORAGES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
# How files of PyTorch before 1.6 start: a pickle of a magic number.
_OLD_FORMAT = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")


class Storage:
    """The numbers of one or several tensors; those of a zip archive stay there until needed."""

    def __init__(self, dtype: type, count: int):
        self.dtype, self.count = np.dtype(dtype), count
        self.read = bytes  # () -> their bytes; set once the file's layout is known

    def numbers(self) -> np.ndarray:
        """All of them, [count]; raises ValueError if the file is damaged."""
        try:
            return np.frombuffer(self.read(), self.dtype, self.count)
        except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
            raise ValueError(f"the file is damaged: {error}") from error


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, as a view of its storage; `np.asarray` reads it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        """Raises TypeError or ValueError for a view that is none."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if min(self.offset, *self.strides, *self.shape, 0) < 0:
            raise ValueError("a tensor with negative strides")
        if 0 not in self.shape and self.offset + last >= self.storage.count:
            raise ValueError("a tensor reaches beyond its numbers")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """The numbers, of the file's dtype unless another is given."""
        flat = self.storage.numbers()[self.offset :]
        strides = [stride * flat.itemsize for stride in self.strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides), dtype)


class _ForeignError(pickle.UnpicklingError):
    """The pickle names something else than tensors and plain values."""


def load(path: str) -> Any:
    """What a file of PyTorch holds, with a `Tensor` in place of each tensor.

    Raises:
      ValueError: if the file is none, holds more than tensors and plain values, or is not whole: a
        phrase that begins with the path.
    """
    is_old = _check_format(path)
    try:
        return _load_old(path) if is_old else _load_zip(path)
    except _ForeignError as error:
        raise ValueError(f"{path} holds {error}, and loading that could run any code") from error
    except (EOFError, struct.error) as error:
        raise ValueError(f"{path} is a PyTorch checkpoint that was cut short") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, OSError, *_WRONG_PICKLE) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read ({reason})") from error


# What Python raises for a pickle whose parts do not go together.
_WRONG_PICKLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


def _check_format(path):
    """Whether a file has the format before 1.6; raises ValueError for a file that is neither."""
    with open(path, "rb") as file:
        start = file.read(len(_OLD_FORMAT))
    if not start:
        raise ValueError(f"{path} is empty")
    if start == _OLD_FORMAT:
        return True
    if not start.startswith(b"PK"):
        what = "a safetensors file, " if path.endswith(".safetensors") else ""
        raise ValueError(f"{path} is {what}not a PyTorch checkpoint")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is a PyTorch checkpoint that was cut short")
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise ValueError(f"{path} is a zip archive, but not a PyTorch checkpoint")
    return False


def _load_zip(path):
    archive = zipfile.ZipFile(path)
    name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    unpickler = _Unpickler(io.BytesIO(archive.read(name)))
    tree = unpickler.load()
    for key, storage in unpickler.storages.items():
        member = f"{name.removesuffix('data.pkl')}data/{key}"
        storage.read = functools.partial(archive.read, member)
    return tree


def _load_old(path):
    with open(path, "rb") as file:
        for _ in range(3):  # the magic number, the version, and the widths of C's types
            _Unpickler(file).load()
        unpickler = _Unpickler(file)
        tree = unpickler.load()
        for key in _Unpickler(file).load():
            storage = unpickler.storages[key]
            (count,) = struct.unpack("<q", file.read(8))
            data = file.read(count * storage.dtype.itemsize)
            if count != storage.count or len(data) != count * storage.dtype.itemsize:
                raise EOFError
            storage.read = functools.partial(bytes, data)
    return tree


class _Unpickler(pickle.Unpickler):
    """Builds tensors and plain values; refuses every other name."""

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.storages = {}

    def find_class(self, module, name):
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _KNOWN:
            raise _ForeignError(f"an object of {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, count, *_ = pid
        if kind != "storage":
            raise _ForeignError(f"an object of kind {kind}")
        if key not in self.storages:
            self.storages[key] = Storage(dtype, count)
        return self.storages[key]


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return Tensor(storage, offset, shape, strides)


class _Ignored:
    """NumPy's scalars and their types, among an optimizer's settings: nothing here reads them."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("numpy", "dtype"): _Ignored,
    ("numpy.core.multiarray", "scalar"): _Ignored,
    ("numpy._core.multiarray", "scalar"): _Ignored,
    ("_codecs", "encode"): _Ignored,
}


def save(path: str, tree: Any) -> None:
    """Writes a file that `torch.load` reads: dicts, lists, tuples and plain values, with tensors
    for NumPy arrays. The same tree gives the same bytes."""
    arrays = []
    pickled = b"".join([b"\x80\x02", *_pickled(tree, arrays), b"."])
    with files.whole(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        archive.writestr(_member("data.pkl"), pickled)
        archive.writestr(_member("byteorder"), "little")
        for key, array in enumerate(arrays):
            archive.writestr(_member(f"data/{key}"), np.ascontiguousarray(array).tobytes())
        archive.writestr(_member("version"), "3\n")


def _member(name):
    return zipfile.ZipInfo(f"archive/{name}")  # at the first date that a zip archive knows


def _pickled(value, arrays):
    """The opcodes of a value; appends its arrays to `arrays`."""
    if isinstance(value, np.ndarray):
        strides = [math.prod(value.shape[i + 1 :]) for i in range(value.ndim)]
        yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
        yield from _pickled("storage", arrays)
        yield f"ctorch\n{_STORAGES[value.dtype]}\n".encode()
        for each in (str(len(arrays)), "cpu", value.size):
            yield from _pickled(each, arrays)
        yield b"tQ"
        arrays.append(value)
        for each in (0, value.shape, tuple(strides), False):
            yield from _pickled(each, arrays)
        yield b"ccollections\nOrderedDict\n)RtR"
    elif isinstance(value, dict):
        yield b"}("
        for pair in value.items():
            for each in pair:
                yield from _pickled(each, arrays)
        yield b"u"
    elif isinstance(value, (tuple, list)):
        yield b"(" if isinstance(value, tuple) else b"]("
        for each in value:
            yield from _pickled(each, arrays)
        yield b"t" if isinstance(value, tuple) else b"e"
    elif isinstance(value, str):
        text = value.encode()
        yield b"X" + struct.pack("<I", len(text)) + text
    else:
        yield pickle.dumps(value, 2)[2:-1]  # without the version and the end
