"""Writes files that are whole or absent: a reader never finds half of one."""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator


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


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes a text file that is whole or absent."""
    with whole(path) as unfinished:
        unfinished.write_text(text)
