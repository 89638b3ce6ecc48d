"""Prepares any folder of images for training.

    python -m maskdm_jax.data.prepare --images DIR --name celebahq --size 256

Every image is cropped to its central square (or to the shape of --size HxW), resized, and stored
encoded in TFDS ArrayRecord format; a plain 8-bit JPEG or PNG of the right size is kept byte for
byte. Folders train, val and test in DIR become splits, and each other sub-folder a class. What
cannot be read is counted and named; if it is more than 1 %, that is an error, and nothing is
written.
"""

import argparse
import collections
import hashlib
import os
import pathlib
import re
import sys
import textwrap

from PIL import ImageColor

from maskdm_jax.data import folders, writer
from maskdm_jax.data.encode import Target, encode_all
from maskdm_jax.data.folders import counting_order, shown
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import command_line, progress
from maskdm_jax.run.files import local_path

_MAX_LOST_SHARE = 0.01


def prepare(
    images: str | pathlib.Path,
    name: str,
    size: tuple[int, int],
    *,
    data_dir: str | pathlib.Path = "~/tensorflow_datasets",
    channels: int = 3,
    encoding: str = "png",
    quality: int = 95,
    background: str = "white",
    test_share: float = 0.0,
    num_processes: int | None = None,
) -> pathlib.Path:
    """Writes the images of a folder as a data set; see the module's docstring.

    Args:
      images: the folder, searched with its sub-folders.
      name: the set's name: lower-case letters, digits and underscores.
      size: (height, width) in pixels.
      data_dir: the folder of TFDS sets.
      channels: 3 (RGB) or 1 (grey).
      encoding: "png" (lossless) or "jpeg", for images that have to be resized.
      quality: JPEG quality, 1 to 100.
      background: the colour behind transparent parts, a name or "#rrggbb".
      test_share: the share of the images that go to split "test", by a hash of their names; for a
        folder that has no splits.
      num_processes: default: one per core.

    Returns:
      The set's folder.

    Raises:
      ConfigError: if the folder, the name or the images cannot be used.
      RunError: if the disk is full, or a process was killed.
    """
    root, data_dir = local_path(images, "--images"), local_path(data_dir, "--data_dir")
    target = Target(size, channels, encoding, quality, _colour(background))
    _check(root, name, target, test_share)
    found = folders.find(root)
    if not found.images:
        left_out = f" but {found.described()}" if found.left_out else ""
        raise ConfigError(
            f"--images {shown(root)} holds no images{left_out}; expected files that Pillow reads, "
            "such as .jpg and .png"
        )
    _check_lost(root, found, [])
    splits = folders.splits(root, found.images)
    if test_share:
        splits = _divided(root, splits, test_share)
    with writer.sole_writer(name, data_dir, "--data_dir"):
        if writer.exists(name, data_dir):
            raise ConfigError(
                f"the data set {data_dir / name} exists; delete that folder to make it again, or "
                "type another --name"
            )
        return _write(root, name, data_dir, target, found, splits, num_processes or os.cpu_count())


def _write(root, name, data_dir, target, found, splits, num_processes):
    members = [member for split in splits.values() for member in split]
    encoded = encode_all([path for path, _ in members], target, num_processes)
    tracked = progress.track(encoded, len(members), f"preparing {name}", "images")
    unreadable, many_frames = [], []
    counts = {split: collections.Counter() for split in splits}

    def examples(split):
        for path, label in splits[split]:
            result = next(tracked)
            if result.data is None:
                unreadable.append(f"{shown(path)}: {result.problem}")
                progress.remark(f"skipped {unreadable[-1]}")
                continue
            if result.num_frames > 1:
                many_frames.append(shown(path, root))
            counts[split][label] += 1
            yield result.data, label, shown(path, root)
        if not counts[split]:
            raise ConfigError(
                f"--images {shown(root)}: no image of split {split} can be read, see above; repair "
                "or remove them, then run again"
            )
        if split == [*splits][-1]:
            for _ in tracked:  # ends the progress
                pass
            _check_lost(root, found, unreadable)

    classes = sorted({label for _, label in members}, key=counting_order)
    height, width = target.size
    folder = writer.write(
        name,
        data_dir,
        {split: examples(split) for split in splits},
        num_examples=len(members),
        image_shape=(*target.size, target.channels),
        classes=classes,
        description=f"Images of the folder {shown(root.name)}, {height}x{width} pixels.",
    )
    for split, count in counts.items():
        print(f"split {split}: {count.total():,} images in {len(count)} class(es)")
    total = sum(counts.values(), collections.Counter())
    labels = ", ".join(f"{i} = {c} ({total[c]:,})" for i, c in enumerate(classes))
    print(textwrap.fill(f"labels: {labels}", 100, subsequent_indent="  "))
    if many_frames:
        print(f"took the first frame of {len(many_frames):,} files, such as {many_frames[0]}")
    if found.left_out:
        print(f"left out: {found.described()}")
    print(f"wrote {total.total():,} images, {len(unreadable)} unreadable, to {shown(folder)}")
    return folder


def _divided(root, splits, test_share):
    if [*splits] != ["train"]:
        raise ConfigError(
            f"--test_share {test_share:g} is for a folder without splits, but --images "
            f"{shown(root)} has {' and '.join(splits)}; leave --test_share out"
        )

    def is_test(path):
        digest = hashlib.sha256(os.fsencode(path.relative_to(root))).digest()
        return int.from_bytes(digest[:8]) < test_share * 2**64

    divided = {"train": [], "test": []}
    for member in splits["train"]:
        divided["test" if is_test(member[0]) else "train"].append(member)
    for split, members in divided.items():
        if not members:
            raise ConfigError(
                f"--test_share {test_share:g} leaves none of {len(splits['train'])} images for "
                f"split {split}; type another share"
            )
    return divided


def _check_lost(root, found, unreadable):
    lost = len(unreadable) + found.num_lost()
    total = len(found.images) + found.num_lost()
    if lost <= total * _MAX_LOST_SHARE:
        return
    parts = []
    if unreadable:
        parts.append(f"{len(unreadable)} unreadable, listed above")
    if found.num_lost():
        parts.append(found.described())
    raise ConfigError(
        f"--images {shown(root)}: {lost:,} of {total:,} files would be left out, more than 1 %: "
        f"{'; '.join(parts)}; convert them to .png, repair or remove them, then run again"
    )


def _check(root, name, target, test_share):
    if not root.is_dir():
        raise ConfigError(f"--images {shown(root)} is not a folder; expected a folder of images")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        near = re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_0123456789") or "my_faces"
        raise ConfigError(
            f"--name {name!r} is not a data set's name; expected lower-case letters, digits and "
            f"underscores, a letter first; type --name {near}"
        )
    if min(target.size) < 1:
        raise ConfigError(f"--size {target.size} is not positive; type pixels, such as --size 64")
    if not 1 <= target.quality <= 100:
        raise ConfigError(
            f"--quality {target.quality} is not a JPEG quality, 1 to 100; type --quality 95"
        )
    if not 0 <= test_share < 1:  # false for nan too
        raise ConfigError(
            f"--test_share {test_share:g} is not a share, 0 to below 1; type --test_share 0.05"
        )


def _colour(text):
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise ConfigError(
            f"--background {text!r} is not a colour; type a name, such as --background black, or "
            'its red, green and blue, such as --background "#808080"'
        ) from error


def _size(text):
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}; expected pixels, such as 256 or 128x64")
    return int(match[1]), int(match[2] or match[1])


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of processes, such as 4")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m maskdm_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", required=True, help="folder of images, or of class folders")
    parser.add_argument("--name", required=True, help="name of the data set, for config.data.name")
    parser.add_argument("--size", required=True, type=_size, help="pixels: 256, or 128x64 (HxW)")
    parser.add_argument("--data_dir", default="~/tensorflow_datasets", help="as config.data.dir")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--encoding", choices=("png", "jpeg"), default="png")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality")
    parser.add_argument(
        "--background", default="white", help="colour behind transparent parts: a name or #rrggbb"
    )
    parser.add_argument(
        "--test_share", type=float, default=0.0, help="share of the images for split test"
    )
    parser.add_argument("--num_processes", type=_positive, help="default: one per core")
    args = vars(parser.parse_args(argv))
    return command_line.exit_code(lambda: prepare(**args))


if __name__ == "__main__":
    sys.exit(main())
