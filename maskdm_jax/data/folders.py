"""What a folder of images holds: its images, their splits and classes, and what is left out."""

import codecs
import collections
import dataclasses
import mimetypes
import os
import pathlib
import re

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
    """What `find` saw below a folder."""

    images: list[pathlib.Path]
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
    formats, suffixes = pixels.formats(), pixels.suffixes()

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
            if kind := _why_no_image(path, formats, suffixes):
                left_out[kind].append(shown(path, root))
            else:
                images.append(path)
    images.sort(key=lambda path: [counting_order(part) for part in path.relative_to(root).parts])
    return Found(images, {kind: sorted(names) for kind, names in sorted(left_out.items())})


def _why_no_image(path, formats, suffixes):
    """The kind of a file that is no image; "" for an image."""
    if path.name.startswith("."):
        return _HIDDEN
    try:
        if not path.exists():
            return "links to nothing"
        if not path.is_file():
            return "neither files nor folders"
    except PermissionError:
        return "files without permission"
    suffix = path.suffix.lower()
    if suffix in suffixes:
        return ""
    try:
        with Image.open(path, formats=formats):
            return ""
    except PermissionError:
        return "files without permission"
    except Exception:  # Pillow's readers raise errors of any type on what they do not know
        pass
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        is_picture = (mimetypes.guess_type(path.name)[0] or "").startswith("image/")
        # Incremental: a character that is cut at the end is no error.
        codecs.getincrementaldecoder("utf-8")().decode(head)
        if b"\0" not in head and not is_picture:
            return _TEXT
    except ValueError:
        pass
    return f"files *{suffix}" if suffix else "files without a suffix"


def splits(root: pathlib.Path, images: list[pathlib.Path]) -> dict[str, list[tuple]]:
    """Each split's (path, class) pairs, in the order of `images`.

    Folders named train, val (or validation) and test directly below `root` are splits, if no other
    folder there holds images. Below a split, or below `root` without splits, each folder is a class
    if it holds every image; otherwise all images are one class.

    Raises:
      ConfigError: if images lie beside class folders, or folders of other names beside splits.
    """
    tops = {path.relative_to(root).parts[0] for path in images if path.parent != root}
    loose = [path for path in images if path.parent == root]
    named = sorted(top for top in tops if top.lower() in _SPLITS)
    if not named:
        return {"train": _classes(root, root, images)}
    others = sorted(tops - set(named), key=counting_order)
    if others or loose:
        other = others[0] if others else loose[0].name
        raise ConfigError(
            f"--images {shown(root)} holds {shown(other)} beside {named[0]}, the name of a split; "
            "expected folders of splits alone (train, val, test) or of classes alone: move or "
            f"rename one of them, or type "
            f"--images={quoted(shown(root / named[0]))} to use that alone"
        )
    found = {}
    for top in named:
        if _SPLITS[top.lower()] in found:
            raise ConfigError(
                f"--images {shown(root)} holds several folders of split {_SPLITS[top.lower()]}: "
                f"{', '.join(named)}; expected one for each split: rename or merge them, or type "
                f"--images={quoted(shown(root / named[0]))} to use that alone"
            )
        members = [path for path in images if path.relative_to(root).parts[0] == top]
        found[_SPLITS[top.lower()]] = _classes(root, root / top, members)
    has_classes = {split: any(c != _ONE_CLASS for _, c in found[split]) for split in found}
    if len(set(has_classes.values())) > 1:
        with_classes = [split for split, has in has_classes.items() if has]
        raise ConfigError(
            f"--images {shown(root)} has class folders in {' and '.join(with_classes)} only; "
            "expected them in every split, or in none: move the images of the other splits into "
            f"class folders, or type --images={quoted(shown(root / named[0]))} to use that alone"
        )
    order = list(dict.fromkeys(_SPLITS.values()))
    return {split: found[split] for split in sorted(found, key=order.index)}


def _classes(root, top, images):
    loose = [path for path in images if path.parent == top]
    if loose and len(loose) < len(images):
        raise ConfigError(
            f"--images {shown(root)} holds images beside sub-folders ({shown(loose[0], root)}, "
            "say); move them into a sub-folder, since each sub-folder is a class, or all images "
            "into one folder"
        )
    if loose:
        return [(path, _ONE_CLASS) for path in images]
    return [(path, shown(path.relative_to(top).parts[0])) for path in images]


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
