"""Opens a data set: any TFDS set with images, read through `data_source`, without TensorFlow."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from maskdm_jax.data import digits, writer
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import files, lock


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set by index: `source[i]` is {"image": uint8 [H, W, C], "label": int32 scalar}."""

    records: Any  # TFDS's random-access data source
    folder: pathlib.Path  # of the prepared set
    split: str
    num_classes: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self.records[int(index)]
        return {"image": record["image"], "label": np.int32(record.get("label", 0))}


def open_source(config) -> Source:
    """The set of `config.data`; the embedded digits are written on first use.

    Raises:
      ConfigError: if the set is missing, or its images or number of classes differ from the
        config's.
    """
    data = config.data
    data_dir = files.local_path(data.dir, "data.dir")
    if not data.name:
        raise ConfigError(
            "data.name is empty; expected a data set, such as --config.data.name=digits"
        )
    if data.name == digits.NAME and not writer.exists(digits.NAME, data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        with lock.hold(data_dir):
            if not writer.exists(digits.NAME, data_dir):
                digits.write_digits(data_dir)
    try:
        builder = tfds.core.read_only_builder.builder_from_files(data.name, data_dir=str(data_dir))
    except tfds.core.DatasetNotFoundError as error:
        raise ConfigError(
            f"data.name {data.name!r} is not in data.dir {data_dir}; type: python -m "
            f"maskdm_jax.data.prepare --images FOLDER --name {data.name} --size "
            f"{_size(data.image_size)} --data_dir {data_dir}"
        ) from error
    return _checked(config, builder)


def _checked(config, builder):
    data = config.data
    features = dict(builder.info.features.items())
    if "image" not in features:
        raise ConfigError(
            f"data.name {data.name!r} has no images, but {sorted(features)}; type another one"
        )
    if data.split not in builder.info.splits:
        raise ConfigError(
            f"data.split is {data.split!r}; {data.name} has {sorted(builder.info.splits)}; type "
            f"--config.data.split={next(iter(builder.info.splits))}"
        )
    expected = (*data.image_size, data.channels)
    shape = features["image"].shape
    if None in shape:
        raise ConfigError(
            f"data.name {data.name!r} has images of many sizes; make them one size: python -m "
            f"maskdm_jax.data.prepare --images FOLDER --name NAME --size {_size(data.image_size)}"
        )
    if tuple(shape) != expected:
        raise ConfigError(
            f"data.image_size and data.channels are {expected} (height, width, channels), but "
            f"{data.name} has images of {tuple(shape)}; type --config.data.image_size="
            f'"{tuple(shape[:2])}" --config.data.channels={shape[2]}, or prepare the set at '
            f"--size {_size(data.image_size)}"
        )
    num_classes = getattr(features.get("label"), "num_classes", 0)
    if config.model.num_classes not in (0, num_classes):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, but {data.name} has "
            f"{num_classes} classes; type --config.model.num_classes={num_classes}, or 0 to train "
            "without classes"
        )
    try:
        records = builder.as_data_source(data.split)
    except NotImplementedError as error:
        raise ConfigError(
            f"data.name {data.name!r} is not in ArrayRecord format; type: tfds build {data.name} "
            "--file_format=array_record"
        ) from error
    return Source(records, pathlib.Path(builder.data_dir), data.split, num_classes)


def _size(image_size):
    height, width = image_size
    return f"{height}" if height == width else f"{height}x{width}"
