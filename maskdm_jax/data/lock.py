"""A lock on a folder: one of several processes does the work, and the others wait for it."""

import fcntl
import pathlib
from typing import IO


def hold(folder: str | pathlib.Path) -> IO:
    """Waits for `folder`'s lock; closing the returned file, or the end of the process, releases it.

    On a file system without locks nothing is locked: each process does the work, in its own file.

    Raises:
      OSError: if `folder` is not writable.
    """
    file = open(pathlib.Path(folder) / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass
    return file
