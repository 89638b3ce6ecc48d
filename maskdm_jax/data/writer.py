"""Writes encoded images as a TFDS data set in ArrayRecord format, without TensorFlow.

The set appears under its name only once it is whole: TFDS writes a folder beside it and renames it.
"""

import contextlib
import pathlib
from collections.abc import Iterable

from absl import logging

VERSION = "1.0.0"


def write(
    name: str,
    data_dir: str | pathlib.Path,
    examples: Iterable[tuple[bytes, str, str]],
    *,
    image_shape: tuple[int, int, int],
    classes: list[str],
    description: str,
) -> pathlib.Path:
    """Writes split "train" of a new set.

    Args:
      name: the set's name, a lower-case identifier.
      data_dir: the folder of TFDS sets.
      examples: (encoded image, class name, id) of each; JPEG or PNG, kept byte for byte.
      image_shape: (height, width, channels) that every image decodes to.
      classes: all class names; their order gives the labels.
      description: one sentence on where the images come from, kept with the set.

    Returns:
      The set's folder.
    """
    import tensorflow_datasets as tfds  # slow, and `prepare`'s workers load this module too

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=image_shape),
            "label": tfds.features.ClassLabel(names=classes),
            "id": tfds.features.Text(),
        }
    )

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
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index, (image, label, identity) in enumerate(examples):
                yield index, {"image": image, "label": label, "id": identity}

    Builder.name = name
    with _quiet(tfds):
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
