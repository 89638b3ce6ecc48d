"""Writes encoded images as a TFDS data set in ArrayRecord format, without TensorFlow.

The set appears under its name only once it is whole: TFDS writes a folder beside it and renames it.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterable, Iterator

from absl import logging

from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.run import faults, lock

VERSION = "1.0.0"


@contextlib.contextmanager
def sole_writer(name: str, data_dir: str | pathlib.Path, flag: str) -> Iterator[None]:
    """Holds the name of a set for the block; removes what a killed writer of it left.

    Args:
      name: the set's name.
      data_dir: the folder of TFDS sets, which is made.
      flag: what sets that folder, for the error message.

    Raises:
      ConfigError: if the folder cannot be written to.
    """
    data_dir = pathlib.Path(data_dir)
    with contextlib.ExitStack() as stack:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            locked = stack.enter_context(lock.hold(data_dir, f".{name}.lock"))
        except OSError as error:
            if faults.disk_is_full(error):
                raise RunError(f"{flag} {data_dir}: {error.strerror}; make room") from error
            raise ConfigError(
                f"{flag} {data_dir} cannot be written to: {error.strerror}; expected a folder, "
                f"or a path where one can be made; type {flag}=FOLDER"
            ) from error
        if locked:
            for unfinished in (data_dir / name).glob("incomplete.*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        yield


def write(
    name: str,
    data_dir: str | pathlib.Path,
    splits: dict[str, Iterable[tuple[bytes, str, str]]],
    *,
    num_examples: int,
    image_shape: tuple[int, int, int],
    classes: list[str],
    description: str,
) -> pathlib.Path:
    """Writes a new set; call it as `sole_writer` of that name.

    Args:
      name: the set's name, a lower-case identifier.
      data_dir: the folder of TFDS sets.
      splits: for each split (encoded image, class name, id) of each example; the image is a JPEG or
        PNG, and is kept byte for byte.
      num_examples: about how many there are in all.
      image_shape: (height, width, channels) that every image decodes to.
      classes: all class names; their order gives the labels.
      description: one sentence on where the images come from, kept with the set.

    Returns:
      The set's folder.

    Raises:
      RunError: if the disk is full.
    """
    import tensorflow_datasets as tfds  # slow, and `prepare`'s workers load this module too

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=image_shape),
            "label": tfds.features.ClassLabel(names=classes),
            "id": tfds.features.Text(),
        }
    )
    written = written_bytes = 0

    # Not in TFDS's registry, which allows a name only once per process.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(globals()["VERSION"])
        pkg_dir_path = pathlib.Path(data_dir)  # TFDS looks here for a card; there is none

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=features,
                disable_shuffling=True,  # order on disk is the order given; training shuffles
            )

        def _split_generators(self, download_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            nonlocal written, written_bytes
            for index, (image, label, identity) in enumerate(splits[split]):
                yield index, {"image": image, "label": label, "id": identity}
                written += 1
                written_bytes += len(image) + 64  # and about so much for the rest of a record

    Builder.name = name
    remedy = "nothing was written; make room, or type another folder"

    def needed():
        return written_bytes // max(written, 1) * num_examples

    with faults.explain_full_disk(f"the data set {name}", data_dir, remedy, needed), _quiet(tfds):
        builder = Builder(data_dir=str(data_dir), file_format="array_record")
        builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def exists(name: str, data_dir: str | pathlib.Path) -> bool:
    """Whether `data_dir` holds a whole set of that name."""
    return any((pathlib.Path(data_dir) / name).glob("*/dataset_info.json"))


@contextlib.contextmanager
def _quiet(tfds):
    """Switches off TFDS's own progress bars and messages; the caller shows progress."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)
