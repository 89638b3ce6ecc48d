"""Sets in the format of TensorFlow Datasets, read through `data_source`, without TensorFlow."""

import json
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from maskdm_jax.data import digits, toy
from maskdm_jax.data.image_set import ImageSet, damage_explained, ids_by_index
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import nearest_word
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
    remedy = (
        f"restore {folder} from a copy, or delete it, prepare the set again, and type the same "
        "command"
    )
    if not re.fullmatch(r"\w+([/:].*)?", name):  # TFDS takes no other name
        raise ConfigError(_not_found(name, data_dir, size))
    with damage_explained(lambda: f"the data set {folder}", remedy):
        try:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=str(data_dir))
        except tfds.core.DatasetNotFoundError:
            builder = None
    if builder is None:
        raise ConfigError(_not_found(name, data_dir, size))
    return _image_set(builder, name, data_dir, size, remedy)


def open_version(folder: pathlib.Path, remedy: str) -> ImageSet:
    """The prepared set in `folder`, that of one version: the one that holds dataset_info.json.

    Args:
      folder: the set's.
      remedy: what to do if it cannot be read.

    Raises:
      ConfigError: as `open_set`.
    """
    with damage_explained(lambda: f"the data set {folder}", remedy):
        builder = tfds.builder_from_directory(str(folder))
    return _image_set(builder, builder.name, folder.parents[1], "64", remedy)


def _image_set(builder, name, data_dir, size, remedy):
    folder = builder.data_dir
    features = dict(builder.info.features.items())
    if "image" not in features:
        raise ConfigError(
            f"data.name {name!r} has no images, but {sorted(features)}; expected a set with a "
            "feature named image; type --config.data.name=NAME"
        )
    image = features["image"]
    if image.np_dtype != np.uint8 or len(image.shape) != 3 or image.shape[2] is None:
        raise ConfigError(
            f"data.name {name!r} has images that are {' '.join(repr(image).split())}; expected "
            "height, width and channels of uint8, 8 bits per channel; convert the images to PNG, "
            "and type: python -m maskdm_jax.data.prepare --images FOLDER --name my_images --size "
            f"{size} --data_dir {data_dir}"
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
                    f"--file_format=array_record --data_dir={data_dir} --overwrite"
                ) from error
        return _Records(data_source, str(folder), "id" in features)

    label = features.get("label")  # Sequence(ClassLabel) has num_classes too
    num_classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else 0
    sizes = {k: [int(s.num_bytes), s.shard_lengths] for k, s in builder.info.splits.items()}
    return ImageSet(
        splits={split: lambda split=split: opened(split) for split in builder.info.splits},
        image_shape=tuple(image.shape),
        num_classes=num_classes,
        cache_dir=pathlib.Path(builder.data_dir) / "decoded",
        remedy=remedy,
        contents=json.dumps(sizes),
        files=tuple(sorted(p for p in pathlib.Path(builder.data_dir).iterdir() if p.is_file())),
    )


def _not_found(name, data_dir, size):
    """That there is no such set, with what to type for each reason that a user may have."""
    folder = data_dir / name
    if unfinished := sorted(folder.glob("**/incomplete.*")):
        return (
            f"data.name {name!r} is prepared only in part, in {unfinished[0]}; expected a "
            "preparation that has ended: wait until it has or, if it was stopped, type its command "
            f"again: tfds build {name} --file_format=array_record --data_dir={data_dir} for a set "
            "of the TFDS catalogue"
        )
    if configs := sorted(path.parts[-3] for path in folder.glob("*/*/dataset_info.json")):
        return (
            f"data.name {name!r} is a folder of several sets, {', '.join(configs)}; expected one "
            f"of them; type --config.data.name={name}/{configs[0]}"
        )
    there = {path.parents[1].name for path in data_dir.glob("*/*/dataset_info.json")}
    near = nearest_word(name, there | {digits.NAME, toy.NAME})
    own = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "my_images"
    own = own if own[0].isalpha() else f"set_{own}"  # `prepare` takes no other name
    remedies = [f"--config.data.name={near}"] * bool(near)
    catalogue = re.fullmatch(r"([a-z]\w*(/[\w-]+)?)([/:]\d+\.\d+\.\d+)?", name)
    if not (catalogue and "/" in name):
        then = "" if own == name else f" and then --config.data.name={own}"
        remedies.append(
            f"python -m maskdm_jax.data.prepare --images FOLDER --name {own} --size {size} "
            f"--data_dir {data_dir}{then} for images of your own"
        )
    if catalogue:
        remedies.append(
            f"tfds build {catalogue[1]} --file_format=array_record --data_dir={data_dir} for a set "
            "of the TFDS catalogue"
        )
    remedies.append("--config.data.dir=FOLDER for a set that lies elsewhere")
    what = f"data.name {name!r} is not a set in data.dir {data_dir}"
    return f"{what}; type {', or '.join(remedies)}"
