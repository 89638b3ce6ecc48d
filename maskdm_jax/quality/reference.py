"""Sets of images to score and to compare with: a folder, a zip, a prepared set, or statistics.

A path may go on inside a zip, to one of its folders, and inside a prepared set, to a split:
`faces.zip/test`, `~/tensorflow_datasets/faces/train`. Images are decoded as for training: by
Pillow, upright, and transparent parts on white; pytorch-fid ignores orientation and transparency.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from PIL import Image

from maskdm_jax import sharding
from maskdm_jax.data import archives, folders, pixels, read_ahead
from maskdm_jax.data.image_set import damage_explained
from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import frechet
from maskdm_jax.run import files, progress

_THREADS = min(16, os.cpu_count() or 1)
_OVERVIEWS = "grids of samples"


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one size, in the order of their names.

    Fields:
      path: as the user typed it.
      shape: (height, width, channels) of each; channels are 3, or 1 if every image is grey.
      count: number of images, at least 2.
      read: index -> uint8 [H, W, C]; safe to call from several threads.
      keep_as: if what is measured of it may be kept: the beginning of the files' paths, which
        differs for other images.
    """

    path: str
    shape: tuple[int, int, int]
    count: int
    read: Callable[[int], np.ndarray]
    keep_as: pathlib.Path | None = None

    def batches(
        self, size: int, by_batch: NamedSharding | None = None, num_threads: int = _THREADS
    ) -> Iterator[np.ndarray]:
        """uint8 [B, H, W, C] with B = `size`, and what remains at the end.

        Args:
          size: images at a time.
          by_batch: how the rows of a batch are split over devices. If these belong to several
            processes, each decodes its own rows and gets all; then all call this together.
          num_threads: how many images are decoded at once.
        """
        several = by_batch is not None and not by_batch.is_fully_addressable
        firsts, num_rows, indices = range(0, self.count, size), size, range(self.count)
        if several:
            rows = sharding.local_rows(by_batch, size).tolist()
            num_rows = len(rows)
            # Beyond the end, the last batch repeats the last image: each process has rows of it.
            indices = (min(first + row, self.count - 1) for first in firsts for row in rows)
        decoded = read_ahead.in_order(self.read, indices, num_threads, 2 * num_rows)
        for first in firsts:
            batch = np.stack(list(itertools.islice(decoded, num_rows)))
            if several:
                array = jax.make_array_from_process_local_data(by_batch, batch)
                batch = multihost_utils.process_allgather(array, tiled=True)
            yield batch[: self.count - first]


class ContentHash:
    """SHA-256 of a set's images: of their pixels and shapes, in any order and of any container."""

    def __init__(self):
        self._hashes = []

    def add(self, images_BHWC: np.ndarray) -> None:
        shape = repr(images_BHWC.shape[1:]).encode()
        self._hashes += [hashlib.sha256(shape + x.tobytes()).digest() for x in images_BHWC]

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(sorted(self._hashes))).hexdigest()


def open_set(path: str, flag: str, num: int | None = None) -> Images | frechet.Statistics:
    """The set at `path`, checked from the images' headers.

    Args:
      path: a folder (searched with its sub-folders), a .zip, a prepared TFDS set, or an .npz of
        statistics.
      flag: the flag or field it was typed for.
      num: use only the first `num` images, in the order of their names.

    Raises:
      ConfigError: if there is no such set, or it cannot be scored.
    """
    whole = files.local_path(path, flag)
    found, inside = whole, []
    while not found.exists() and found != found.parent:
        found, inside = found.parent, [found.name, *inside]
    inside = "/".join(inside)
    if found.suffix == ".npz" and not inside:
        return frechet.read(found)
    if found.is_file() and zipfile.is_zipfile(found):
        open_file, names, left_out = _in_zip(found, flag, inside)
    elif versions := _prepared(found):
        return _prepared_set(path, flag, versions, inside, num)
    elif found.is_dir() and not inside:
        open_file, names, left_out = _in_folder(found)
    else:
        raise ConfigError(
            f"{flag} {path} is no set; expected a folder or zip of images, a prepared set, or an "
            f".npz of statistics; type {_flag(flag)}=PATH"
        )
    if left_out:
        progress.remark(f"{path}: left out {left_out}")
    if not names:
        raise ConfigError(
            f"{flag} {path} holds no images; expected JPEG, PNG or the like; type "
            f"{_flag(flag)}=PATH"
        )
    names = _first(names, num, path, flag)
    shape = _common_shape(path, flag, names, open_file)

    def decode(index):
        with _explained(flag, path, names[index]), open_file(names[index]) as file:
            return pixels.decode(file.read(), shape[2])

    return Images(path, shape, len(names), decode)


def check_comparable(images: Images, reference: Images) -> None:
    """Refuses two sets whose images differ in size or colour.

    Raises:
      ConfigError: with both shapes and what to type.
    """
    if images.shape == reference.shape:
        return
    (height, width, channels), other = images.shape, reference.shape
    if images.shape[:2] == other[:2]:
        ours, theirs = (
            {1: "grey", 3: "colour"}.get(n, f"of {n} channels") for n in (channels, other[2])
        )
        remedy = f"type a set of {channels} channels in its place"
        if channels in (1, 3):
            remedy = (
                "prepare one like the other: python -m maskdm_jax.data.prepare --channels "
                f"{channels}"
            )
        raise ConfigError(f"{images.path} is {ours}, but {reference.path} is {theirs}; {remedy}")
    raise ConfigError(
        f"{images.path} has images of {height}x{width}, but {reference.path} of "
        f"{other[0]}x{other[1]} (height x width); bring the reference to the same crop and size: "
        f"python -m maskdm_jax.data.prepare --images FOLDER --name NAME --size {height}x{width}"
    )


def _flag(flag):
    return flag if flag.startswith("--") else f"--config.{flag}"


def _first(items, num, path, flag):
    if num is not None and num < 2:
        raise ConfigError(f"--num is {num}; expected at least 2 images, such as --num 1000")
    if num is not None and num > len(items):
        raise ConfigError(
            f"--num is {num}, but {flag} {path} has {len(items)} images; type --num {len(items)}"
        )
    if len(items) < 2:
        raise ConfigError(
            f"{flag} {path} has one image; expected at least 2, and thousands for a score that "
            f"means something; type {_flag(flag)}=PATH"
        )
    return items[:num]


def _explained(flag, path, name):
    remedy = "remove it from the set, or repair it, and type the same command"
    return damage_explained(lambda: f"{flag} {path}: {name}", remedy)


def _in_folder(root):
    """(name -> open file, names of the images, what was left out in words)."""
    found = folders.find(root)
    overviews = [p for p in found.images if _is_overview(p, pathlib.Path.exists)]
    if overviews:
        found.left_out[_OVERVIEWS] = [folders.shown(p, root) for p in overviews]
    names = [p.relative_to(root).as_posix() for p in found.images if p not in overviews]
    return (lambda name: (root / name).open("rb")), names, found.described()


def _is_overview(path, exists):
    """Whether an image is what --mode=sample draws beside its numbered images."""
    return path.name == "grid.png" and exists(path.parent / "settings.json")


def _in_zip(path, flag, inside):
    """The same for the folder `inside` of a zip; what is no image is remarked already."""
    archive, members, images = archives.find(path, f"{_flag(flag)}=FILE.zip")
    within = pathlib.PurePosixPath(inside)
    # A zip of a folder holds that folder, which nobody types.
    for top in (within, archives.top_of(images) / within):
        if names := [name for name in images if name.is_relative_to(top)]:
            break
    shown = [name for name in names if not _is_overview(name, members.__contains__)]
    left_out = f"{_OVERVIEWS}: {len(names) - len(shown):,}" if len(shown) < len(names) else ""
    return (lambda name: archive.open(members[name])), shown, left_out


def _common_shape(path, flag, names, open_file):
    """(height, width, channels) of all images, from their headers."""

    def header(name):
        with _explained(flag, path, name), open_file(name) as file:
            with Image.open(file) as image:
                return *pixels.upright_size(image), pixels.is_grey(image)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        headers = list(pool.map(header, names))
    height, width, _ = headers[0]
    for name, (h, w, _) in zip(names, headers, strict=True):
        if (h, w) != (height, width):
            raise ConfigError(
                f"{flag} {path} has images of different sizes: {names[0]} is {height}x{width}, "
                f"{name} is {h}x{w} (height x width); make them one size: python -m "
                f"maskdm_jax.data.prepare --images FOLDER --name NAME --size {height}x{width}"
            )
    return height, width, 1 if all(grey for *_, grey in headers) else 3


def _prepared(path):
    """Folders of a prepared TFDS set: `path` itself, or its versions."""
    candidates = [path, *sorted(path.glob("*/"))] if path.is_dir() else []
    return [p for p in candidates if (p / "dataset_info.json").exists()]


def _prepared_set(path, flag, versions, split, num):
    from maskdm_jax.data import sources, tfds  # slow, and only prepared sets need it

    if len(versions) > 1:
        raise ConfigError(
            f"{flag} {path} holds several versions; type one of them, such as {versions[-1]}"
        )
    remedy = f"restore {versions[0]} from a copy, or prepare the set again"
    opened = tfds.open_version(versions[0], remedy)
    splits = sorted(opened.splits)
    if not split and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        asked = f"no split {split!r}" if split else "several splits"
        raise ConfigError(
            f"{flag} {path} has {asked}; it has {', '.join(splits)}: type the set's folder with "
            f"one of them, such as {versions[0].parent}/{splits[0]}"
        )
    if None in opened.image_shape:
        raise ConfigError(
            f"{flag} {path} has images of many sizes; prepare them: python -m "
            "maskdm_jax.data.prepare --images FOLDER --name NAME --size 64"
        )
    source = sources.Source(opened.splits[split](), opened.image_shape, 0, opened.cache_dir, split)
    count = len(_first(range(len(source)), num, path, flag))
    return Images(path, source.image_shape, count, lambda index: source[index]["image"])
