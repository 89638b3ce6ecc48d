"""Prepares any folder of images for training.

    python -m maskdm_jax.data.prepare --images DIR --name celebahq --size 256

Every image is cropped to its central square (or to the shape of --size HxW), resized, and stored
encoded in TFDS ArrayRecord format; a JPEG or PNG of the right size is kept byte for byte. Each
sub-folder of DIR is a class. Files that cannot be read are listed and skipped; if they are more
than 1 %, that is an error, and nothing is written.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import io
import itertools
import multiprocessing
import os
import pathlib
import re
import signal
import sys

import numpy as np
from PIL import Image, ImageOps

from maskdm_jax.data import writer
from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.run import command_line, progress
from maskdm_jax.run.files import local_path

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
_MAX_UNREADABLE_SHARE = 0.01
_ONE_CLASS = "all"
_BATCH = 16  # images that a process encodes for one message


def prepare(
    images: str | pathlib.Path,
    name: str,
    size: tuple[int, int],
    *,
    data_dir: str | pathlib.Path = "~/tensorflow_datasets",
    channels: int = 3,
    encoding: str = "png",
    quality: int = 95,
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
      num_processes: default: one per core.

    Returns:
      The set's folder.

    Raises:
      ConfigError: if the folder, the name or the images cannot be used.
    """
    root, data_dir = local_path(images, "--images"), local_path(data_dir, "--data_dir")
    _check(root, name, data_dir, size)
    files = _find(root)
    if not files:
        raise ConfigError(
            f"--images {images} holds no image files; expected some of {sorted(_SUFFIXES)}"
        )
    # Sub-folders are classes if they hold every image; otherwise the folder is one class.
    loose = [p.name for p in files if p.parent == root]
    has_classes = not loose
    if loose and len(loose) < len(files):
        raise ConfigError(
            f"--images {images} holds images beside its sub-folders ({loose[0]}, say); move them "
            "into a sub-folder, since each sub-folder is a class, or all images into one folder"
        )
    labels = [p.relative_to(root).parts[0] if has_classes else _ONE_CLASS for p in files]

    unreadable = []
    jobs = [(str(p), size, channels, encoding, quality) for p in files]

    def examples():
        encoded = _encode_all(jobs, num_processes or os.cpu_count())
        tracked = progress.track(encoded, len(jobs), f"preparing {name}", "images")
        for path, label, (data, problem) in zip(files, labels, tracked, strict=True):
            if data is not None:
                yield data, label, str(path.relative_to(root))
                continue
            unreadable.append(f"{path}: {problem}")
            progress.remark(f"skipped {unreadable[-1]}")
        if len(unreadable) > len(files) * _MAX_UNREADABLE_SHARE:
            raise ConfigError(
                f"--images {images}: {len(unreadable)} of {len(files)} files cannot be read, more "
                "than 1 %; remove or repair those listed above, then run again"
            )

    folder = writer.write(
        name,
        data_dir,
        examples(),
        image_shape=(*size, channels),
        classes=sorted(set(labels)),
        description=f"Images of the folder {root.name}, {size[0]}x{size[1]} pixels.",
    )
    print(
        f"wrote {len(files) - len(unreadable)} images in {len(set(labels))} class(es), "
        f"{len(unreadable)} unreadable, to {folder}"
    )
    return folder


def _check(root, name, data_dir, size):
    if not root.is_dir():
        raise ConfigError(f"--images {root} is not a folder; expected a folder of images")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(
            f"--name {name!r} is not a data set's name; expected lower-case letters, digits and "
            "underscores, a letter first, such as --name my_faces"
        )
    if min(size) < 1:
        raise ConfigError(f"--size {size} is not positive; expected pixels, such as --size 64")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--data_dir {data_dir} cannot be made: {error}; type another") from error
    if writer.exists(name, data_dir):
        raise ConfigError(
            f"the data set {data_dir / name} exists; delete that folder to make it again, or type "
            "another --name"
        )


def _find(root):
    """Image files below `root`; follows links, and skips hidden files and folders."""
    files, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and real not in seen)
        if real in seen:  # a link back to a folder above
            continue
        seen.add(real)
        paths = (pathlib.Path(folder) / name for name in names if not name.startswith("."))
        files += [p for p in paths if p.suffix.lower() in _SUFFIXES and p.is_file()]
    return sorted(files)


def _encode_all(jobs, num_processes):
    """Results of `_encode` in the order of the jobs, from processes of their own.

    Raises:
      RunError: if one of them was killed.
    """
    # spawn: no state of this process, such as another library's threads, is shared.
    context = multiprocessing.get_context("spawn")
    batches = iter([jobs[i : i + _BATCH] for i in range(0, len(jobs), _BATCH)])
    with concurrent.futures.ProcessPoolExecutor(num_processes, context) as pool:
        try:
            with _ctrl_c_blocked():  # the processes start here
                # A few batches ahead of the writer, whose memory the results would fill.
                pending = collections.deque(
                    pool.submit(_encode_batch, batch)
                    for batch in itertools.islice(batches, 4 * num_processes)
                )
            while pending:
                yield from pending.popleft().result()
                for batch in itertools.islice(batches, 1):
                    pending.append(pool.submit(_encode_batch, batch))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RunError(
                "a process that encodes images was killed, most likely for lack of memory; nothing "
                f"was written; type fewer than {num_processes} --num_processes"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _ctrl_c_blocked():
    """Delays Ctrl-C. A terminal sends it to every process; those started here inherit the block, so
    this one alone reports that it stopped."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _encode_batch(jobs):
    return [_encode(job) for job in jobs]


def _encode(job):
    """(encoded image, None), or (None, why not); runs in a worker process."""
    path, size, channels, encoding, quality = job
    mode = "RGB" if channels == 3 else "L"
    try:
        data = pathlib.Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # a truncated file fails here
            fits = image.format in ("JPEG", "PNG") and image.mode == mode
            upright = image.getexif().get(0x0112, 1) == 1
            if fits and upright and image.size == (size[1], size[0]):
                return data, None
            if image.mode.startswith("I;16"):  # Pillow's own conversion saturates at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.exif_transpose(image).convert(mode)
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        if encoding == "jpeg":
            image.save(out, "JPEG", quality=quality, subsampling=0)
        else:
            image.save(out, "PNG")
        return out.getvalue(), None
    except Exception as error:  # Pillow's decoders raise errors of any type on a broken file
        reason = re.sub(r" ?<_io.BytesIO[^>]*>", "", str(error))
        return None, f"{type(error).__name__}: {reason}"


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
    parser.add_argument("--num_processes", type=_positive, help="default: one per core")
    args = vars(parser.parse_args(argv))
    return command_line.exit_code(lambda: prepare(**args))


if __name__ == "__main__":
    sys.exit(main())
