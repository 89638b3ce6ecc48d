"""Places, and files that are whole or absent: a reader never finds half of one.

A place is a folder or file of the local file system (a pathlib.Path), or of a bucket (an
epath.Path, which has the same methods). This module knows the difference; `is_remote` tells it to
the few that must act on it: locks, commit marks, copies of data sets, room on disks, W&B.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import shutil
import socket
import sys
import tempfile
import unicodedata
from collections.abc import Iterator

from maskdm_jax.errors import ConfigError
from maskdm_jax.run import bucket

_BUCKET = "gs://"


def place(path, name: str):
    """The place that a user typed, which a program may then read and write.

    Args:
      path: a local path, as for `local_path`; or gs://BUCKET/FOLDER.
      name: the flag or field it was typed for.

    Returns:
      A pathlib.Path or, in a bucket, an epath.Path.

    Raises:
      ConfigError: as `local_path`; for a bucket that does not exist or cannot be used from here,
        within seconds.
      BucketError: for a bucket that does not answer.
    """
    _check_printable(path, name)
    if is_remote(path):
        return bucket.checked(str(path), name)
    return _local_path(path, name, f"or {_BUCKET}BUCKET/FOLDER in Google Cloud Storage")


def local_path(path: str | pathlib.Path, name: str) -> pathlib.Path:
    """The absolute path of what a user typed, with ~ for the home folder.

    Args:
      path: relative or absolute.
      name: the flag or field it was typed for.

    Raises:
      ConfigError: for a URL such as gs://bucket/run, which as a path would be a folder named "gs:";
        for control characters other than white space, and bytes that are not UTF-8, which no
        terminal can show; for ~ if no home folder is known; for a name that is too long.
    """
    _check_printable(path, name)
    return _local_path(path, name, "since buckets are not supported")


def out_folder(path: str, name: str) -> pathlib.Path:
    """The folder that a user typed for what a program writes, made with those above it.

    Args:
      path: as for `local_path`.
      name: the flag it was typed for.

    Raises:
      ConfigError: as `local_path`; for a file, or a path below one; if nothing can be written.
    """
    folder = local_path(path, name)
    try:
        make_folder(folder)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{name} is {path}, which is a file or lies below one; expected a folder; type another "
            f"{name}"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{name} is {path}, where nothing can be written: {error.strerror}; expected a folder "
            f"of your own; type another {name}"
        ) from error
    return folder


def is_remote(path) -> bool:
    """Whether a path, as text or as a place, is in a bucket."""
    return str(path).startswith(_BUCKET)


def as_place(path):
    """`path`, which `place` has checked before, as a place; a text may have become one."""
    return bucket.path(str(path)) if is_remote(path) else pathlib.Path(path)


def _check_printable(path, name):
    path = str(path)
    if any(unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() for c in path):
        raise ConfigError(
            f"{name} is {path!r}; expected a path that can be printed; type another {name}"
        )


def _local_path(path, name, buckets):
    path = str(path)
    if not path:
        flag = name if name.startswith("--") else f"--config.{name}"
        raise ConfigError(f"{name} is ''; expected a path; type {flag}=FOLDER")
    if re.match(r"[A-Za-z][\w+.-]*:/", path):
        raise ConfigError(
            f"{name} is {path}; expected a path of a local or mounted file system, {buckets}; type "
            "such a path, for example /mnt/share/run"
        )
    try:
        absolute = pathlib.Path(path).expanduser().absolute()
        absolute.exists()
        return absolute
    except OSError as error:  # such as a name that is too long
        raise ConfigError(
            f"{name} {path} cannot be used: {error.strerror}; type another {name}"
        ) from error
    except RuntimeError as error:
        flag = name if name.startswith("--") else f"--config.{name}"
        raise ConfigError(
            f"{name} is {path}, but no home folder is known here for ~; type a whole path, such as "
            f"{flag}=/data"
        ) from error


@contextlib.contextmanager
def whole(path) -> Iterator[pathlib.Path]:
    """Yields a temporary local path, whose file becomes `path` if the block ends without an error.

    Locally its name starts with a dot and is unique to this process, even among hosts that share
    the folder. For a bucket it lies in the folder for temporary files, and is uploaded.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            unfinished = pathlib.Path(folder) / as_place(path).name
            yield unfinished
            bucket.upload(unfinished, path)
        return
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_leftovers(folder, pattern: str) -> None:
    """Removes what `whole` left of files named like `pattern` when its process was killed.

    The caller holds the folder's lock, so nobody is writing them now. In a bucket nothing is left.
    """
    if is_remote(folder):
        return
    for unfinished in pathlib.Path(folder).glob(f".{pattern}.*-*"):
        unfinished.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    """Writes a text file that is whole or absent."""
    if is_remote(path):
        bucket.upload(text.encode(), path)
        return
    with whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a power cut would otherwise leave the name with nothing in it


def make_folder(folder) -> None:
    """Makes a folder, with those above it, and writes a file there that it removes again.

    Raises:
      OSError: if no file can be written there.
    """
    if is_remote(folder):
        probe = folder / f".{socket.gethostname()}-{os.getpid()}"
        bucket.upload(b"", probe)
        bucket.retried(probe.unlink, missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def parents(path) -> list:
    """The folders that a place is in, from the innermost outwards; the last may be a bucket."""
    return [each for each in path.parents if not is_remote(path) or len(each.parts) > 2]


def remove_tree(folder) -> None:
    """Removes a folder with all that is in it."""
    bucket.remove_tree(folder) if is_remote(folder) else shutil.rmtree(folder)


def move(folder, target) -> None:
    """Moves a folder to a place where nothing is."""
    bucket.move(folder, target) if is_remote(folder) else os.rename(folder, target)


def below(folder) -> dict:
    """{relative path: place} of the files of a folder and of those in it."""
    if is_remote(folder):
        places = bucket.below(folder)
    else:
        places = [pathlib.Path(at) / name for at, _, names in os.walk(folder) for name in names]
    return {place.relative_to(folder).as_posix(): place for place in places}


def holding(folder, name: str) -> list:
    """The folders of a folder in which there is a file of that name."""
    found = list(folder.iterdir())
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        holds = pool.map(lambda each: (each / name).exists(), found)
        return [each for each, is_there in zip(found, holds, strict=True) if is_there]


def blocks(path) -> Iterator[bytes]:
    """The content of a file, in pieces."""
    if is_remote(path):
        yield from bucket.blocks(path)
        return
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            yield block


def modified(path) -> float:
    """When a file was written, in seconds."""
    return path.stat().mtime if is_remote(path) else path.stat().st_mtime


def growing(folder) -> "Here | bucket.Mirror":
    """Where files that grow are written, of a folder that may be in a bucket.

    They go to the result's local folder, which is `folder` itself if that is local. Otherwise they
    are copied to the bucket, each as a whole, by `sync` and `close`.
    """
    return bucket.Mirror(folder) if is_remote(folder) else Here(pathlib.Path(folder))


class Here:
    """`bucket.Mirror` of a local folder: the folder itself."""

    def __init__(self, folder: pathlib.Path):
        self.local = folder

    def sync(self, now: bool = False) -> None:
        """Nothing: every byte is there."""

    close = sync


def lost(error: BaseException) -> bool:
    """Whether an exception means that a bucket does not answer."""
    return "gcsfs" in sys.modules and bucket.is_lost(error)
