"""Images in one file, read without unpacking it: a zip of image files, and LSUN's lmdb."""

import collections
import functools
import hashlib
import io
import pathlib
import re
import zipfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from maskdm_jax.data import folders, pixels
from maskdm_jax.data.image_set import ImageSet, Records, damage_explained
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import progress

_NUM_SAMPLED = 64  # images that are looked at for the set's size and channels
_MAX_LOST_SHARE = 0.01


class _Member(NamedTuple):
    info: zipfile.ZipInfo
    label: int
    id: bytes  # its path, as `prepare` would store it


class _ZipRecords:
    def __init__(self, archive: zipfile.ZipFile, members: list[_Member]):
        self._archive = archive
        self._members = members

    def __len__(self):
        return len(self._members)

    def __getitem__(self, index):
        member = self._members[index]
        return {"image": self._archive.read(member.info), "label": member.label, "id": member.id}

    def ids(self) -> Iterable[bytes]:
        return (member.id for member in self._members)

    def name(self, index):
        return f"{self._members[index].id.decode()} of {self._archive.filename}"


def open_zip(path: pathlib.Path, cache_dir: pathlib.Path) -> ImageSet:
    """A zip of image files; splits and classes are found as in a folder, by `folders.splits`.

    If all lies in one folder, as in a zip of a folder, that folder counts as the top.

    Raises:
      ConfigError: if it is not a whole zip file, is encrypted, holds no images or a name twice, or
        if more than 1 % of its files may have been meant as images but are none.
    """
    if not path.is_file():
        raise ConfigError(
            f"data.name is {path}, which is no file; expected a .zip of images; type "
            "--config.data.name=FILE.zip, with a path from the root or from data.dir"
        )
    remedy = "copy or make it again, and type the same command"
    with damage_explained(lambda: f"the zip file {path}", remedy):
        archive, members, images = find(path, "--config.data.name=FILE.zip")
    top = top_of(images)
    splits = folders.splits(top, images, path)
    classes = {label for split in splits.values() for _, label in split}
    labels = {label: i for i, label in enumerate(sorted(classes, key=folders.counting_order))}

    def member(image, label):
        identity = folders.shown("/".join(image.parts[len(top.parts) :])).encode()
        return _Member(members[image], labels[label], identity)

    records = {
        split: _ZipRecords(archive, [member(image, label) for image, label in pairs])
        for split, pairs in splits.items()
    }
    remedy = f"repair or remove it, make {path.name} again, and type the same command"
    checksums = sorted((str(name), info.CRC) for name, info in members.items())
    contents = hashlib.sha256(repr(checksums).encode()).hexdigest()
    opened = _image_set(records, len(labels), cache_dir, remedy)
    return opened._replace(contents=contents, files=(path,))


def find(
    path: pathlib.Path, typed: str
) -> tuple[zipfile.ZipFile, dict[pathlib.PurePosixPath, zipfile.ZipInfo], list]:
    """A zip, where each of its files lies, and the paths of its images in counting order.

    Args:
      path: the zip file.
      typed: what to type for another one.

    Raises:
      ConfigError: if it is encrypted, holds no images or a name twice, or if more than 1 % of its
        files may have been meant as images but are none.
    """
    archive = zipfile.ZipFile(path)
    members = _members(archive)
    return archive, members, _found(archive, members, typed).images


def _members(archive):
    """Each file's path in the archive, and where it lies."""
    members = {}
    for info in archive.infolist():
        if info.flag_bits & 1:
            raise ConfigError(
                f"the zip file {archive.filename} is encrypted; expected one without a password; "
                "make it again, and type the same command"
            )
        path = pathlib.PurePosixPath(info.filename.lstrip("/"))
        if path in members:
            raise ConfigError(
                f"the zip file {archive.filename} holds {folders.shown(path)} twice; expected "
                "every name once; make it again, and type the same command"
            )
        if not info.is_dir():
            members[path] = info
    return members


def _found(archive, members, typed):
    """The images among the members, in the order in which people count, and what is left out."""
    images, left_out = [], collections.defaultdict(list)
    for path, info in members.items():
        hidden = next((part for part in path.parts if part.startswith(".")), "")
        if kind := folders.why_no_image(hidden or path.name, lambda i=info: archive.open(i)):
            left_out[kind].append(folders.shown(path))
        else:
            images.append(path)
    found = folders.Found(sorted(images, key=folders.path_order), left_out)
    if not images:
        but = f" but {found.described()}" if left_out else ""
        raise ConfigError(
            f"the zip file {archive.filename} holds no images{but}; expected files that Pillow "
            f"reads, such as .jpg and .png; type {typed}"
        )
    if found.num_lost() > _MAX_LOST_SHARE * (len(images) + found.num_lost()):
        raise ConfigError(
            f"more than 1 % of the zip file {archive.filename} would be left out: "
            f"{found.described()}; expected images; convert them to .png or remove them, make it "
            "again, and type the same command"
        )
    if left_out:
        progress.remark(f"left out of {archive.filename}: {found.described()}")
    return found


def top_of(images: list[pathlib.PurePosixPath]) -> pathlib.PurePosixPath:
    """The folder in the archive that holds splits or classes: its top, or the only one there, since
    zipping a folder puts the folder itself into the archive."""
    first = images[0].parts[0]
    within = all(image.parts[0] == first and len(image.parts) > 1 for image in images)
    return pathlib.PurePosixPath(first if within and not folders.is_split(first) else "")


class _LmdbRecords:
    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._environment = _environment(folder)
        with self._environment.begin() as transaction:
            self._keys = list(transaction.cursor().iternext(values=False))

    def __len__(self):
        return len(self._keys)

    def __getitem__(self, index):
        with self._environment.begin() as transaction:
            return {"image": transaction.get(self._keys[index]), "id": self._keys[index]}

    def ids(self) -> Iterable[bytes]:
        return self._keys

    def name(self, index):
        return f"{folders.shown(self._keys[index].decode(errors='replace'))} of {self._folder}"


def open_lmdb(folder: pathlib.Path, cache_dir: pathlib.Path) -> ImageSet:
    """A folder of LSUN, such as church_outdoor_train_lmdb: one split, named by the folder's name.

    Raises:
      ConfigError: if the package lmdb is missing, or the folder cannot be read.
    """
    remedy = f"unpack {folder} again, and type the same command"
    with damage_explained(lambda: f"the lmdb {folder}", remedy):
        records = _LmdbRecords(folder)
    if not len(records):
        raise ConfigError(f"the lmdb {folder} holds no images; {remedy}")
    word = re.fullmatch(r".*?_?(train|val|test)(_lmdb)?", folder.name)
    split = {"val": "validation", "test": "test"}.get(word and word[1], "train")
    return _image_set({split: records}, 0, cache_dir, remedy)._replace(files=(folder / "data.mdb",))


@functools.cache
def _environment(folder):
    # lmdb refuses to open a folder twice in one process.
    try:
        import lmdb
    except ImportError as error:
        raise ConfigError(
            f"data.name {folder.name!r} needs the package lmdb; type: pip install "
            "'maskdm_jax[lmdb]'"
        ) from error
    return lmdb.open(str(folder), readonly=True, create=False, lock=False, readahead=False)


def _image_set(splits: dict[str, Records], num_classes, cache_dir, remedy):
    sizes, are_grey = set(), set()
    for records in splits.values():
        for index in np.unique(np.linspace(0, len(records) - 1, _NUM_SAMPLED).astype(int)):
            with damage_explained(functools.partial(records.name, index), remedy):
                data = io.BytesIO(records[index]["image"])
                with Image.open(data, formats=pixels.formats()) as image:
                    sizes.add(pixels.upright_size(image))
                    are_grey.add(pixels.is_grey(image))
    height, width = (
        side.pop() if len(side) == 1 else None for side in map(set, zip(*sizes, strict=True))
    )
    return ImageSet(
        splits={split: lambda records=records: records for split, records in splits.items()},
        image_shape=(height, width, 1 if are_grey == {True} else 3),
        num_classes=num_classes,
        cache_dir=cache_dir,
        remedy=remedy,
    )
