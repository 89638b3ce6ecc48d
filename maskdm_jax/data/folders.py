"""What a folder of images holds: its images, their splits and classes, and what is left out."""

import codecs
import collections
import dataclasses
import mimetypes
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, BinaryIO

from PIL import Image

from maskdm_jax.data import pixels
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import quoted

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_ONE_CLASS = "all"
_HIDDEN, _TEXT = "hidden (the name starts with a dot)", "text"
# Kinds that go with images, and are no loss.
_EXPECTED = {_HIDDEN, _TEXT}


@dataclasses.dataclass
class Found:
    """The images of a folder or an archive, and what else is there."""

    images: list[Any]
    left_out: dict[str, list[str]]  # kind -> names

    def num_lost(self) -> int:
        """How many of those left out may have been meant as images."""
        return sum(len(names) for kind, names in self.left_out.items() if kind not in _EXPECTED)

    def described(self) -> str:
        """What was left out, in words; "" for nothing."""
        return "; ".join(
            f"{kind}: {len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in self.left_out.items()
        )


def find(root: pathlib.Path) -> Found:
    """All images below `root`, in the order in which people count; follows links.

    A file is an image if Pillow reads files of its suffix or, with another suffix or none, if
    Pillow recognises its content.
    """
    images, left_out = [], collections.defaultdict(list)

    def cannot_list(error):
        left_out["folders without permission"].append(shown(error.filename, root))

    for folder, subfolders, names in os.walk(root, onerror=cannot_list, followlinks=True):
        # A link back to a folder above would never end; any other link is read where it stands.
        above = {os.path.realpath(parent) for parent in (folder, *pathlib.Path(folder).parents)}
        looped = [s for s in subfolders if os.path.realpath(os.path.join(folder, s)) in above]
        subfolders[:] = sorted(set(subfolders) - set(looped))
        for name in [n for n in subfolders if n.startswith(".")]:
            left_out[_HIDDEN].append(shown(os.path.join(folder, name), root))
            subfolders.remove(name)
        for name in names:
            path = pathlib.Path(folder, name)
            if kind := _why_no_image(path):
                left_out[kind].append(shown(path, root))
            else:
                images.append(path)
    images.sort(key=lambda path: path_order(path.relative_to(root)))
    return Found(images, {kind: sorted(names) for kind, names in sorted(left_out.items())})


def _why_no_image(path):
    try:
        if path.name.startswith("."):
            return _HIDDEN
        if not path.exists():
            return "links to nothing"
        if not path.is_file():
            return "neither files nor folders"
    except PermissionError:
        return "files without permission"
    return why_no_image(path.name, lambda: path.open("rb"))


def why_no_image(name: str, open_file: Callable[[], BinaryIO]) -> str:
    """The kind of a file that is no image; "" for an image.

    Args:
      name: the file's, without its folder.
      open_file: opens it; called if the suffix does not tell.
    """
    if name.startswith("."):
        return _HIDDEN
    suffix = pathlib.PurePath(name).suffix.lower()
    if suffix in pixels.suffixes():
        return ""
    try:
        with open_file() as file, Image.open(file, formats=pixels.formats()):
            return ""
    except PermissionError:
        return "files without permission"
    except Exception:  # Pillow's readers raise errors of any type on what they do not know
        pass
    try:
        with open_file() as file:
            head = file.read(4096)
        is_picture = (mimetypes.guess_type(name)[0] or "").startswith("image/")
        # Incremental: a character that is cut at the end is no error.
        codecs.getincrementaldecoder("utf-8")().decode(head)
        if b"\0" not in head and not is_picture:
            return _TEXT
    except ValueError:
        pass
    return f"files *{suffix}" if suffix else "files without a suffix"


def splits(
    root: pathlib.PurePath,
    images: list[pathlib.PurePath],
    archive: pathlib.PurePath | None = None,
) -> dict[str, list[tuple]]:
    """Each split's (path, class) pairs, in the order of `images`.

    Folders named train, val (or validation) and test directly below `root` are splits, if no other
    folder there holds images. Below a split, or below `root` without splits, each folder is a class
    if it holds every image; otherwise all images are one class.

    Args:
      root: the folder.
      images: paths that begin with `root`.
      archive: the file that holds `root`, if it is no folder on disk.

    Raises:
      ConfigError: if images lie beside class folders, or folders of other names beside splits.
    """
    what = f"data.name {shown(archive)}" if archive else f"--images {shown(root)}"
    depth = len(root.parts)
    tops = {path.parts[depth] for path in images if len(path.parts) > depth + 1}
    loose = [path for path in images if len(path.parts) == depth + 1]
    named = sorted(top for top in tops if is_split(top))
    if not named:
        return {"train": _classes(what, root, images)}
    alone = f", or type --images={quoted(shown(root / named[0]))} to use that alone"
    alone = "" if archive else alone
    others = sorted(tops - set(named), key=counting_order)
    if others or loose:
        other = others[0] if others else loose[0].name
        raise ConfigError(
            f"{what} holds {shown(other)} beside {named[0]}, the name of a split; "
            "expected folders of splits alone (train, val, test) or of classes alone: move or "
            f"rename one of them{alone}"
        )
    found = {}
    for top in named:
        if _SPLITS[top.lower()] in found:
            raise ConfigError(
                f"{what} holds several folders of split {_SPLITS[top.lower()]}: "
                f"{', '.join(named)}; expected one for each split: rename or merge them{alone}"
            )
        members = [path for path in images if path.parts[depth] == top]
        found[_SPLITS[top.lower()]] = _classes(what, root / top, members)
    has_classes = {split: any(c != _ONE_CLASS for _, c in found[split]) for split in found}
    if len(set(has_classes.values())) > 1:
        with_classes = [split for split, has in has_classes.items() if has]
        raise ConfigError(
            f"{what} has class folders in {' and '.join(with_classes)} only; "
            "expected them in every split, or in none: move the images of the other splits into "
            f"class folders{alone}"
        )
    order = list(dict.fromkeys(_SPLITS.values()))
    return {split: found[split] for split in sorted(found, key=order.index)}


def is_split(name: str) -> bool:
    """Whether a folder of that name is a split."""
    return name.lower() in _SPLITS


def _classes(what, top, images):
    depth = len(top.parts)
    loose = [path for path in images if len(path.parts) == depth + 1]
    if loose and len(loose) < len(images):
        raise ConfigError(
            f"{what} holds images beside sub-folders ({shown(loose[0].name)}, say); move them into "
            "a sub-folder, since each sub-folder is a class, or all images into one folder"
        )
    if loose:
        return [(path, _ONE_CLASS) for path in images]
    return [(path, shown(path.parts[depth])) for path in images]


def path_order(path: pathlib.PurePath) -> list:
    """A sort key for relative paths that puts 2 before 10 in every part."""
    return [counting_order(part) for part in path.parts]


def counting_order(name: str) -> tuple:
    """A sort key that puts 2 before 10; no two names have the same."""
    parts = re.split(r"(\d+)", name)
    counted = [(part, 0) if i % 2 == 0 else ("", int(part)) for i, part in enumerate(parts)]
    return counted, name


def shown(path: str | pathlib.Path, root: str | pathlib.Path | None = None) -> str:
    """A name as printable text: bytes that are not UTF-8, and control characters, as escapes."""
    if root is not None:
        path = os.path.relpath(path, root)
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
