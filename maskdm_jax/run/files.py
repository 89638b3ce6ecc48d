"""Local paths, and files that are whole or absent: a reader never finds half of one."""

import contextlib
import os
import pathlib
import re
import socket
import unicodedata
from collections.abc import Iterator

from maskdm_jax.errors import ConfigError


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
    path = str(path)
    if any(unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() for c in path):
        raise ConfigError(
            f"{name} is {path!r}; expected a path that can be printed; type another {name}"
        )
    if not str(path):
        flag = name if name.startswith("--") else f"--config.{name}"
        raise ConfigError(f"{name} is ''; expected a path; type {flag}=FOLDER")
    if re.match(r"[A-Za-z][\w+.-]*:/", path):
        raise ConfigError(
            f"{name} is {path}; expected a folder of a local or mounted file system, since buckets "
            "are not supported; type its path, such as /mnt/share/run"
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
def whole(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path, which is renamed to `path` if the block ends without an error.

    Its name starts with a dot and is unique to this process, even among hosts that share the
    folder.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: str | pathlib.Path, pattern: str) -> None:
    """Removes what `whole` left of files named like `pattern` when its process was killed.

    The caller holds the folder's lock, so nobody is writing them now.
    """
    for unfinished in pathlib.Path(folder).glob(f".{pattern}.*-*"):
        unfinished.unlink(missing_ok=True)


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes a text file that is whole or absent."""
    with whole(path) as unfinished, unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a power cut would otherwise leave the name with nothing in it
