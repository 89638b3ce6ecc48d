"""Opens a data set: any TFDS set with images, read through `data_source`, without TensorFlow."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from maskdm_jax.data import digits, pixels
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import nearest_word
from maskdm_jax.run import files

_FINGERPRINT_EXAMPLES = 64


class NoSplitError(ConfigError):
    """The data set has no such split."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set by index: `source[i]` is {"image": uint8 [H, W, C], "label": int32 scalar}."""

    records: Any  # TFDS's random-access data source; its images are encoded, or uint8 arrays
    folder: pathlib.Path  # of the prepared set
    split: str
    image_shape: tuple[int, int, int]
    num_classes: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image, label = self._read(index)
        if isinstance(image, bytes):
            with self._damage_explained(index):
                image = pixels.decode(image, self.image_shape[-1])
        return {"image": image, "label": np.int32(label)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over the number of examples and the bytes of 64 of them, evenly spaced.

        It is the same for a copy of the set in another place.
        """
        sha = hashlib.sha256(json.dumps([len(self), self.image_shape, self.num_classes]).encode())
        for index in np.unique(np.linspace(0, len(self) - 1, _FINGERPRINT_EXAMPLES).astype(int)):
            image, label = self._read(index)
            data = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
            sha.update(f"{index} {label} {len(data)}\n".encode() + data)
        return sha.hexdigest()

    def _read(self, index):
        with self._damage_explained(index):
            record = self.records[int(index)]
            return record["image"], record.get("label", 0)

    def _damage_explained(self, index):
        return _damage_explained(f"example {index} of {self.folder}", self.folder)


@contextlib.contextmanager
def _damage_explained(what, folder):
    """Turns any error of the readers, which raise all kinds of them, into one sentence."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{what} cannot be read: {reason}; restore {folder} from a copy, or delete it, prepare "
            "the set again, and type the same command"
        ) from error


def open_source(config) -> Source:
    """The set of `config.data`; the embedded digits are written on first use.

    Raises:
      ConfigError: if the set is missing or damaged, or its images or number of classes differ from
        the config's.
    """
    data = config.data
    data_dir = files.local_path(data.dir, "data.dir")
    if not data.name:
        raise ConfigError(
            "data.name is ''; expected a data set; type --config.data.name=digits, say"
        )
    if data_dir.exists() and not data_dir.is_dir():
        raise ConfigError(
            f"data.dir {data_dir} is a file; expected the folder of data sets; type "
            f"--config.data.dir={data_dir.parent}"
        )
    if data.name == digits.NAME:
        digits.write_digits(data_dir)
    if not re.fullmatch(r"\w+([/:].*)?", data.name):  # TFDS takes no other name
        raise ConfigError(_not_found(data, data_dir))
    folder = data_dir / data.name
    with _damage_explained(f"the data set {folder}", folder):
        try:
            builder = tfds.core.read_only_builder.builder_from_files(
                data.name, data_dir=str(data_dir)
            )
        except tfds.core.DatasetNotFoundError:
            builder = None
    if builder is None:
        raise ConfigError(_not_found(data, data_dir))
    return _checked(config, builder, data_dir)


def _not_found(data, data_dir):
    """That there is no such set, with what to type for each reason that a user may have."""
    there = {path.parents[1].name for path in data_dir.glob("*/*/dataset_info.json")}
    near = nearest_word(data.name, there | {digits.NAME})
    name = re.sub(r"[^a-z0-9]+", "_", data.name.lower()).strip("_") or "my_images"
    name = name if name[0].isalpha() else f"set_{name}"  # `prepare` takes no other name
    remedies = [f"--config.data.name={near}"] * bool(near)
    found = re.fullmatch(r"([a-z]\w*)(/.*)?", data.name)
    if not (found and found[2]):
        then = "" if name == data.name else f" and then --config.data.name={name}"
        remedies.append(
            f"python -m maskdm_jax.data.prepare --images FOLDER --name {name} --size "
            f"{_size(data.image_size)} --data_dir {data_dir}{then} for images of your own"
        )
    if found:
        remedies.append(
            f"tfds build {found[1]} --file_format=array_record --data_dir={data_dir} for a set of "
            "the TFDS catalogue"
        )
    remedies.append("--config.data.dir=FOLDER for a set that lies elsewhere")
    what = f"data.name {data.name!r} is not a set in data.dir {data_dir}"
    return f"{what}; type {', or '.join(remedies)}"


def _checked(config, builder, data_dir):
    data = config.data
    features = dict(builder.info.features.items())
    if "image" not in features:
        raise ConfigError(
            f"data.name {data.name!r} has no images, but {sorted(features)}; expected a set with a "
            "feature named image; type --config.data.name=NAME"
        )
    splits = sorted(builder.info.splits)
    if data.split not in splits:
        near = nearest_word(data.split.partition("[")[0], splits) or splits[0]
        raise NoSplitError(
            f"data.split is {data.split!r}; expected a split of {data.name}, which has "
            f"{', '.join(splits)}; type --config.data.split={near}"
        )
    image = features["image"]
    if image.np_dtype != np.uint8:
        raise ConfigError(
            f"data.name {data.name!r} has images of {np.dtype(image.np_dtype)}; expected uint8, 8 "
            "bits per channel; convert the images to PNG, and type: python -m "
            "maskdm_jax.data.prepare --images FOLDER --name my_images --size "
            f"{_size(data.image_size)} --data_dir {data_dir}"
        )
    expected, shape = (*data.image_size, data.channels), image.shape
    if None in shape:
        raise ConfigError(
            f"data.name {data.name!r} has images of many sizes; expected one size; write its "
            "images to a folder, and type: python -m maskdm_jax.data.prepare --images FOLDER "
            f"--name my_images --size {_size(data.image_size)} --data_dir {data_dir}, and then "
            "--config.data.name=my_images"
        )
    if tuple(shape) != expected:
        raise ConfigError(
            f"data.image_size and data.channels are {expected} (height, width, channels), but "
            f"{data.name} has images of {tuple(shape)}; type --config.data.image_size="
            f'"{tuple(shape[:2])}" --config.data.channels={shape[2]}'
        )
    num_classes = getattr(features.get("label"), "num_classes", 0)
    if config.model.num_classes not in (0, num_classes):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, but {data.name} has "
            f"{num_classes} classes; type --config.model.num_classes={num_classes}"
            + " (or =0 to train without classes)"
            * bool(num_classes)
        )
    # Encoded images stay encoded here: Source decodes them.
    encoded = isinstance(image, tfds.features.Image)
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    try:
        records = builder.as_data_source(data.split, decoders=decoders)
    except NotImplementedError as error:
        raise ConfigError(
            f"data.name {data.name!r} is not in ArrayRecord format; type: tfds build "
            f"{builder.name} --file_format=array_record --data_dir={data_dir} --overwrite"
        ) from error
    return Source(records, pathlib.Path(builder.data_dir), data.split, expected, num_classes)


def _size(image_size):
    height, width = image_size
    return f"{height}" if height == width else f"{height}x{width}"
