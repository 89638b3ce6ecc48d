"""One process does the work that several find undone; the others wait for it."""

import fcntl
import pathlib
from typing import IO


def hold(folder: str | pathlib.Path) -> IO:
    """Waits for `folder`'s lock; closing what is returned, or dying, lets go of it.

    A file system that has no locks gives none: then each process does the work, to its own file.

    Raises:
      OSError: where nothing can be written in `folder`.
    """
    file = open(pathlib.Path(folder) / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass
    return file
