"""Sets in the format of TensorFlow Datasets, read through `data_source`, without TensorFlow."""

import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from maskdm_jax.data.image_set import ImageSet, damage_explained, ids_by_index
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import progress


class _Records:
    """A split; its images are encoded, or uint8 arrays."""

    def __init__(self, data_source, name: str, has_ids: bool):
        self._data_source = data_source
        self._name = name
        self._has_ids = has_ids

    def __len__(self):
        return len(self._data_source)

    def __getitem__(self, index):
        return self._data_source[index]

    def ids(self) -> Iterable[bytes]:
        return self._stored_ids() if self._has_ids else ids_by_index(len(self))

    def name(self, index):
        return f"example {index} of {self._name}"

    def _stored_ids(self) -> Iterator[bytes]:
        indices = progress.track(range(len(self)), len(self), f"ids of {self._name}", "examples")
        for index in indices:
            identity = self[index]["id"]
            yield identity if isinstance(identity, bytes) else str(identity).encode()


def open_set(name: str, data_dir: pathlib.Path, size: str) -> ImageSet:
    """The prepared set `name`, such as "cifar10" or "celeb_a_hq/256", in `data_dir`.

    Args:
      name: as in TFDS: the set, and its config and version if there are several.
      data_dir: the folder of TFDS sets.
      size: the config's image size as `prepare` takes it, for error messages.

    Raises:
      ConfigError: if it is missing, half prepared or damaged, or is not in a format that this
        reads.
    """
    folder = data_dir / name
    remedy = f"restore {folder} from a copy, or delete it and prepare the set again"
    with damage_explained(lambda: f"the data set {folder}", remedy):
        try:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=str(data_dir))
        except tfds.core.DatasetNotFoundError:
            builder = None
    if builder is None:
        raise ConfigError(_not_found(name, data_dir, size))
    features = dict(builder.info.features.items())
    if "image" not in features:
        raise ConfigError(
            f"data.name {name!r} has no images, but {sorted(features)}; type another one"
        )
    image = features["image"]
    if image.np_dtype != np.uint8:
        raise ConfigError(
            f"data.name {name!r} has images of {np.dtype(image.np_dtype)}; expected uint8, 8 "
            "bits per channel: convert the images to PNG and type: python -m "
            f"maskdm_jax.data.prepare --images FOLDER --name NAME --size {size}"
        )
    # Encoded images stay encoded here: Source decodes them.
    encoded = isinstance(image, tfds.features.Image)
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None

    def opened(split):
        with damage_explained(lambda: f"the data set {folder}", remedy):
            try:
                data_source = builder.as_data_source(split, decoders=decoders)
            except NotImplementedError as error:
                raise ConfigError(
                    f"data.name {name!r} is not in ArrayRecord format; type: tfds build {name} "
                    f"--file_format=array_record --overwrite --data_dir={data_dir}"
                ) from error
        return _Records(data_source, str(folder), "id" in features)

    return ImageSet(
        splits={split: lambda split=split: opened(split) for split in builder.info.splits},
        image_shape=tuple(image.shape),
        num_classes=getattr(features.get("label"), "num_classes", 0),
        cache_dir=pathlib.Path(builder.data_dir) / "decoded",
        remedy=remedy,
    )


def _not_found(name, data_dir, size):
    """Why there is no such set, and what to type."""
    folder = data_dir / name
    build = f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
    prepare = (
        f"python -m maskdm_jax.data.prepare --images FOLDER --name {name} --size {size} "
        f"--data_dir {data_dir}"
    )
    commands = build if "/" in name else f"{prepare}, or, for a set of the TFDS catalogue, {build}"
    if unfinished := sorted(folder.glob("**/incomplete.*")):
        return (
            f"data.name {name!r} is prepared only in part, in {unfinished[0]}: the preparation is "
            f"still running, or was stopped; wait, or type: {commands}"
        )
    if configs := sorted(path.parts[-3] for path in folder.glob("*/*/dataset_info.json")):
        return (
            f"data.name {name!r} is one of several sets in {folder}: {', '.join(configs)}; type "
            f"--config.data.name={name}/{configs[0]}"
        )
    return f"data.name {name!r} is not in data.dir {data_dir}; type: {commands}"
