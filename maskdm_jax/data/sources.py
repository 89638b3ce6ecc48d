"""Opens the data set of a config: finds its reader, and checks it against the config.

A reader is a file of its own that returns an `ImageSet`, and a line of `_find`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib

import numpy as np

from maskdm_jax.data import archives, digits, mirror, pixels, tfds, toy
from maskdm_jax.data.image_set import ImageSet, Records, damage_explained
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import nearest_word, quoted
from maskdm_jax.run import files

_FINGERPRINT_EXAMPLES = 64
# Once per process: a run does not change under itself when its set changes in the bucket.
_local_copy = functools.cache(mirror.local_copy)


class NoSplitError(ConfigError):
    """The data set has no such split."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set by index: `source[i]` is {"image": uint8 [H, W, C], "label": int32 scalar}.

    Fields:
      records: its examples, or the part of them that `data.fraction` takes.
      image_shape: (height, width, channels) of the images that this returns.
      num_classes: 0 if there are no labels.
      cache_dir: where decoded images may be kept, shared by all sources of the set.
      split, crop, fraction: the fields of `config.data`.
      remedy: what to do if an example cannot be read.
      contents, files: see `ImageSet`.
    """

    records: Records
    image_shape: tuple[int, int, int]
    num_classes: int
    cache_dir: pathlib.Path
    split: str = "train"
    crop: str = "none"
    fraction: float = 1.0
    remedy: str = "prepare the set again"
    contents: str = ""
    files: tuple[pathlib.Path, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image, label = self._read(index)
        with self._damage_explained(index):
            if isinstance(image, bytes):
                image = pixels.decode(image, self.image_shape[-1], self.crop, self.image_shape[:2])
            elif self.crop != "none":
                image = pixels.cropped_array(image, self.crop, self.image_shape[:2])
        if image.shape != self.image_shape:
            raise ConfigError(
                f"{self.records.name(index)} has {_shown(image.shape)} pixels; expected "
                f"{_shown(self.image_shape)}, data.image_size; type --config.data.crop=center"
            )
        # Without classes a label may be anything: a text, a list.
        return {"image": image, "label": np.int32(label if self.num_classes else 0)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over the crop, what the set's files say of their contents, and 64 examples.

        It is the same for a copy of the set in another place. The examples are evenly spaced over
        those that `data.fraction` takes; reading all of a large set would take minutes at every
        start.
        """
        facts = [len(self), self.image_shape, self.num_classes, self.contents]
        facts += [self.crop] * (self.crop != "none")
        sha = hashlib.sha256(json.dumps(facts).encode())
        for index in np.unique(np.linspace(0, len(self) - 1, _FINGERPRINT_EXAMPLES).astype(int)):
            image, label = self._read(index)
            data = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
            sha.update(f"{index} {label} {len(data)}\n".encode() + data)
        return sha.hexdigest()

    @functools.cached_property
    def version(self) -> str:
        """A short hash that differs after the set was prepared again, or its files were changed.

        What is derived from the set, such as decoded images, is kept under this name.
        """
        stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        return hashlib.sha256(f"{self.fingerprint} {stamps}".encode()).hexdigest()[:12]

    @property
    def variant(self) -> str:
        """What distinguishes this source's decoded images from others in `cache_dir`."""
        crop = "" if self.crop == "none" else f"-{self.crop}{_shown(self.image_shape)}"
        return self.split + crop + ("" if self.fraction == 1 else f"-{self.fraction:g}")

    def _read(self, index):
        with self._damage_explained(index):
            record = self.records[int(index)]
            return record["image"], record.get("label", 0)

    def _damage_explained(self, index):
        return damage_explained(lambda: self.records.name(int(index)), self.remedy)


class _Part:
    """Some of the examples of `records`, in the same order."""

    def __init__(self, records: Records, indices: np.ndarray):
        self._records = records
        self._indices = indices

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        return self._records[int(self._indices[index])]

    def name(self, index):
        return self._records.name(int(self._indices[index]))


def open_source(config) -> Source:
    """The set of `config.data`; the embedded digits are written on first use.

    Raises:
      ConfigError: if the set is missing or damaged, or its images or number of classes differ from
        the config's.
    """
    data = config.data
    data_dir = files.place(data.dir, "data.dir")
    if not data.name:
        raise ConfigError(
            "data.name is ''; expected a data set; type --config.data.name=digits, say"
        )
    if not files.is_remote(data_dir) and data_dir.exists() and not data_dir.is_dir():
        raise ConfigError(
            f"data.dir {data_dir} is a file; expected the folder of data sets; type "
            f"--config.data.dir={quoted(data_dir.parent)}"
        )
    found = _find(config, data_dir)
    _check(config, found)
    records = found.splits[data.split]()
    if not len(records):
        raise ConfigError(
            f"data.split is {data.split!r}, in which {data.name} has no examples; expected at "
            f"least one; type --config.data.split=NAME with another of {', '.join(found.splits)}"
        )
    return Source(
        records if data.fraction == 1 else _part(records, data),
        (*data.image_size, data.channels),
        found.num_classes,
        found.cache_dir,
        data.split,
        data.crop,
        data.fraction,
        found.remedy,
        found.contents,
        found.files,
    )


def _find(config, data_dir) -> ImageSet:
    """The one place where a name becomes a set."""
    name = config.data.name
    if files.is_remote(name):
        folder, _, file = name.rpartition("/")
        raise ConfigError(
            f"data.name is {name}; expected a set's name, or a local path; type "
            f"--config.data.dir={quoted(folder)} --config.data.name={quoted(file)}"
        )
    typed = files.local_path(name, "data.name")  # refuses any other URL
    is_absolute = name.startswith(("/", "~"))
    copied = None
    if files.is_remote(data_dir):
        local_dir = files.local_path(config.data.local_dir, "data.local_dir")
        if not is_absolute and name not in (toy.NAME, digits.NAME):
            copied = _local_copy(data_dir, name, local_dir)
        data_dir = mirror.folder_of(data_dir, local_dir)
    path = typed if is_absolute else copied or data_dir / name
    cache_dir = data_dir / "decoded" / path.name
    if name == toy.NAME:
        return toy.open_swiss_roll(cache_dir)
    if path.suffix.lower() == ".zip":
        return archives.open_zip(path, cache_dir)
    if (path / "data.mdb").exists():
        return archives.open_lmdb(path, cache_dir)
    if name == digits.NAME:
        digits.write_digits(data_dir)
    if copied:
        return tfds.open_version(copied, f"delete {copied}, and type the same command")
    return tfds.open_set(name, data_dir, _shown(config.data.image_size))


def _check(config, found: ImageSet):
    data = config.data
    splits = sorted(found.splits)
    if data.split not in splits:
        near = nearest_word(data.split.partition("[")[0], splits) or splits[0]
        raise NoSplitError(
            f"data.split is {data.split!r}; expected a split of {data.name}, which has "
            f"{', '.join(splits)}; type --config.data.split={near}"
        )
    _check_shape(data, found.image_shape)
    if config.model.num_classes not in (0, found.num_classes):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, but {data.name} has "
            f"{found.num_classes or 'no label that is one class per image, and so 0'} classes; "
            f"type --config.model.num_classes={found.num_classes}"
            + " (or =0 to train without classes)"
            * bool(found.num_classes)
        )


def _check_shape(data, shape):
    expected = (*data.image_size, data.channels)
    many_sizes = None in shape
    if data.crop == "none" and many_sizes:
        raise ConfigError(
            f"data.name {data.name!r} has images of many sizes; expected "
            f"{_shown(expected)} pixels, data.image_size; type --config.data.crop=center to cut "
            "and resize them"
        )
    if data.crop == "none" and shape != expected:
        crop = ", or --config.data.crop=center to resize them" if shape[2] == data.channels else ""
        raise ConfigError(
            f"data.image_size and data.channels are {expected} (height, width, channels), but "
            f"{data.name} has images of {shape}; type --config.data.image_size="
            f'"{shape[:2]}" --config.data.channels={shape[2]}{crop}'
        )
    if shape[2] != data.channels:
        raise ConfigError(
            f"data.channels is {data.channels}, but the images of {data.name} have {shape[2]}; "
            f"type --config.data.channels={shape[2]}"
        )
    if data.crop == "celeba" and not many_sizes and shape[:2] != pixels.CELEBA_SIZE[::-1]:
        raise ConfigError(
            f"data.crop is celeba, but {data.name} has images of {shape[:2]} (height, width); "
            "expected the aligned images of CelebA, (218, 178); type --config.data.crop=center"
        )
    height, width = data.image_size
    if data.crop == "celeba" and height != width:
        raise ConfigError(
            f"data.image_size is {height, width}, but data.crop is celeba; expected a square; "
            f'type --config.data.image_size="{height, height}"'
        )


def _part(records, data):
    """The round(fraction * n) examples of smallest SHA-256 of their ids.

    An example's place does not depend on the others, so a smaller fraction lies within a larger
    one.
    """
    count = round(data.fraction * len(records))
    if not count:
        raise ConfigError(
            f"data.fraction is {data.fraction:g}, which is none of the {len(records):,} examples "
            f"of {data.name}; expected at least one; type --config.data.fraction="
            f"{1 / len(records):.2g}, say"
        )
    digests = [hashlib.sha256(identity).digest() for identity in records.ids()]
    # A stable sort: examples of the same id keep their order.
    order = np.argsort(np.array(digests, "S32"), kind="stable")
    return _Part(records, np.sort(order[:count]))


def _shown(shape):
    """A size as `prepare` takes it: "64", or "128x64" for height and width."""
    height, width = shape[:2]
    return f"{height}" if height == width else f"{height}x{width}"
