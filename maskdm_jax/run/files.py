"""Files that are whole or absent: what a reader finds under a name was written to its end."""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def whole(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a name to write to, which becomes `path` where the block ends without an error.

    The name is this process's own, also among hosts that share the folder, and starts with a dot.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    yield unfinished
    os.replace(unfinished, path)


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes a file whole."""
    with whole(path) as unfinished:
        unfinished.write_text(text)
