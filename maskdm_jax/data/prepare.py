"""Prepares any folder of images for training.

    python -m maskdm_jax.data.prepare --images DIR --name celebahq --size 256

Every image is cropped to its central square (or to the shape of --size HxW), resized, and stored
encoded in TFDS ArrayRecord format; a plain 8-bit JPEG or PNG of the right size is kept byte for
byte. Folders train, val and test in DIR become splits, and each other sub-folder a class. What
cannot be read is counted and named; if it is more than 1 %, that is an error, and nothing is
written.
"""

import collections
import hashlib
import os
import pathlib
import re
import sys
import textwrap

from PIL import ImageColor

from maskdm_jax import fields
from maskdm_jax.data import digits, folders, mirror, writer
from maskdm_jax.data.encode import Target, encode_all
from maskdm_jax.data.folders import counting_order, shown
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import command_line, files, progress

_MAX_LOST_SHARE = 0.01
_MAX_SIDE = 8192  # pixels


def prepare(
    images: str | pathlib.Path,
    name: str,
    size: tuple[int, int],
    *,
    data_dir: str | pathlib.Path = "~/tensorflow_datasets",
    local_dir: str | pathlib.Path = "~/.cache/maskdm_jax",
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
      data_dir: the folder of TFDS sets. If it lies in a bucket, the set is prepared in `local_dir`
        and then uploaded.
      local_dir: as `config.data.local_dir`.
      channels: 3 (RGB) or 1 (grey).
      encoding: "png" (lossless) or "jpeg", for images that have to be resized.
      quality: JPEG quality, 1 to 100.
      background: the colour behind transparent parts, a name or "#rrggbb".
      test_share: the share of the images that go to split "test", by a hash of their names; for a
        folder that has no splits.
      num_processes: default: one per core.

    Returns:
      The set's folder; for a bucket, the one in `local_dir`.

    Raises:
      ConfigError: if the folder, the name or the images cannot be used, or a bucket not be written.
      RunError: if the disk is full, a process was killed, or a bucket stopped answering.
    """
    root, data_dir = files.local_path(images, "--images"), files.place(data_dir, "--data_dir")
    target = Target(size, channels, encoding, quality, _colour(background))
    _check(root, name)
    found = folders.find(root)
    if not found.images:
        left_out = f" but {found.described()}" if found.left_out else ""
        raise ConfigError(
            f"--images {shown(root)} holds no images{left_out}; expected files that Pillow reads, "
            "such as .jpg and .png; type --images=FOLDER"
        )
    _check_lost(root, found, [])
    splits = folders.splits(root, found.images)
    if test_share:
        splits = _divided(root, splits, test_share)
    with mirror.new_set(name, data_dir, local_dir) as folder:
        return _write(root, name, folder, target, found, splits, num_processes or os.cpu_count())


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
            f"{shown(root)} has {' and '.join(splits)}; type the same command without --test_share"
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
                f"split {split}; type --test_share=0.5, say"
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


def _check(root, name):
    if not root.is_dir():
        raise ConfigError(
            f"--images is {shown(root)}, which is no folder; expected a folder of images; type "
            "--images=FOLDER"
        )
    if name == digits.NAME:
        raise ConfigError(
            f"--name is {name!r}, the name of the embedded set; type --name=my_{name}, say"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]{,99}", name):
        near = re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_0123456789") or "my_faces"
        raise ConfigError(
            f"--name {name!r} is not a data set's name; expected up to 100 lower-case letters, "
            f"digits and underscores, a letter first; type --name={near[:100]}"
        )


def _colour(text):
    try:
        colour = ImageColor.getrgb(text)[:3]
        if max(colour) > 255:
            raise ValueError
        return colour
    except ValueError as error:
        raise ConfigError(
            f"--background {text!r} is not a colour; type --background=black, say, or its "
            'red, green and blue: --background="#808080"'
        ) from error


def _read_size(text):
    sides = [int(side) for side in text.split("x")] if re.fullmatch(r"\d+(x\d+)?", text) else [0]
    return (sides * 2)[:2] if all(1 <= side <= _MAX_SIDE for side in sides) else text


def _nearest_size(value, default):
    sides = re.findall(r"(?<![\d.])[1-9]\d*", value)[:2]
    return "x".join(str(min(int(side), _MAX_SIDE)) for side in sides) or "256"


_SIZE = fields.Kind(
    f"pixels, up to {_MAX_SIDE}: 256, or 128x64 (height x width)",
    lambda value: isinstance(value, list),
    _nearest_size,
    _read_size,
)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    example = "python -m maskdm_jax.data.prepare --images=FOLDER --name=faces --size=256"
    parser = command_line.Parser(__doc__, example)
    parser.flag("--images", fields.TEXT, "folder of images, or of class folders", required=True)
    parser.flag("--name", fields.TEXT, "the data set's name, for config.data.name", required=True)
    parser.flag("--size", _SIZE, "pixels of the square, or height x width", required=True)
    parser.flag("--data_dir", fields.TEXT, "as config.data.dir", "~/tensorflow_datasets")
    parser.flag("--local_dir", fields.TEXT, "as config.data.local_dir", "~/.cache/maskdm_jax")
    parser.flag("--channels", fields.choice(3, 1), "3 for RGB, 1 for grey", 3)
    parser.flag("--encoding", fields.one_of("png", "jpeg"), "of images that are resized", "png")
    parser.flag("--quality", fields.whole(1, 100), "of JPEG", 95)
    parser.flag("--background", fields.TEXT, "behind transparent parts: name or #rrggbb", "white")
    parser.flag("--test_share", fields.number(0, 0.99), "share of the images for split test", 0.0)
    parser.flag("--num_processes", fields.COUNT, "one per core if not given")

    def run():
        args = vars(parser.parse(argv))
        del args["changes"]
        prepare(**args | {"size": tuple(args["size"])})

    return command_line.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
