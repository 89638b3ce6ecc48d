"""Locks on folders, which end with the process that holds them, however it dies.

Locally they are flock's, which Linux passes on to the server on NFS: its locks of a host that died
end with that host's lease. A file system without locks locks nothing. In a bucket they are those of
`bucket_lock`.
"""

import contextlib
import datetime
import fcntl
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from maskdm_jax.errors import ConfigError
from maskdm_jax.run import bucket_lock, faults, files
from maskdm_jax.run.progress import say

_RUN_LOCK = ".run_lock"
_WAIT_S = 60  # a restarted job may meet its predecessor, which is still saving


class InUse(ConfigError):
    """Another process holds the folder."""


@contextlib.contextmanager
def hold(folder: str | pathlib.Path, name: str = ".lock") -> Iterator[bool]:
    """Waits for a lock of that name in `folder`, and holds it for the block.

    Yields:
      Whether the lock is held; False on a file system without locks. If it is, what other writers
      left unfinished has no writer any more.

    Raises:
      OSError: if `folder` is not writable.
    """
    if files.is_remote(folder):
        with _held_in_bucket(folder, name, None):
            yield True
        return
    with open(pathlib.Path(folder) / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process, which writes to {folder} ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


@contextlib.contextmanager
def one_run(workdir: str | pathlib.Path, wait_s: float = _WAIT_S) -> Iterator[None]:
    """Holds `workdir` for this run alone; makes the folder, and removes it if it stays empty.

    If another run holds it, waits up to `wait_s` seconds for that run's end.

    Raises:
      InUse: if the other run goes on, with its host, process and start; nothing was changed then.
      ConfigError: if the folder is not writable.
      OSError: if the disk is full.
    """
    if files.is_remote(workdir):
        with _held_in_bucket(workdir, _RUN_LOCK, wait_s):
            yield
        return
    workdir = pathlib.Path(workdir)
    file, is_new = _acquired(workdir, wait_s)
    with file:
        if holder := _holder(file):
            say(f"taking over {workdir} from {holder}, which ended without releasing it")
        _write(file, _myself())
        try:
            yield
        finally:
            _write(file, None)
            # Another run may be waiting for this file, or making one of its own.
            with contextlib.suppress(OSError):
                if is_new and [path.name for path in workdir.iterdir()] == [_RUN_LOCK]:
                    (workdir / _RUN_LOCK).unlink()
                    workdir.rmdir()


@contextlib.contextmanager
def _held_in_bucket(folder, name, wait_s):
    """Holds a lock in a bucket; gives up if its holder is alive after `wait_s` (None: never)."""
    lock = bucket_lock.Lock(files.as_place(folder) / name, _myself())
    deadline, told = time.monotonic() + (math.inf if wait_s is None else wait_s), False
    while (holder := _acquire_in_bucket(lock, folder)) is not None:
        who = _described(holder) or "another run"
        if lock.holder_died:
            say(f"taking over {folder} from {who}, which ended without releasing it")
            continue
        if lock.holder_lives and time.monotonic() > deadline:
            raise _in_use(folder, who)
        if not told:
            say(f"{folder} is in use by {who}; waiting for its end ...")
            told = True
        time.sleep(1)
    try:
        yield
    finally:
        lock.release()


def _acquire_in_bucket(lock, folder):
    try:
        return lock.acquire()
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{folder} cannot be written to with the credentials found here: {reason}; expected "
            "the role Storage Object User on the bucket; grant it, or type another place"
        ) from error


def _acquired(workdir, wait_s):
    """(the locked file, whether this run made the workdir)."""
    while True:
        try:
            is_new = not workdir.exists()
            workdir.mkdir(parents=True, exist_ok=True)
            file = (workdir / _RUN_LOCK).open("a+")
        except OSError as error:
            if faults.disk_is_full(error):
                raise
            # The run before may have removed the folder it made.
            if isinstance(error, FileNotFoundError) and workdir.parent.exists() and not is_new:
                continue
            raise ConfigError(
                f"--workdir {workdir} cannot be written to: {error.strerror}; expected a folder, "
                "or a path where one can be made; type another --workdir"
            ) from error
        _acquire(file, workdir, wait_s)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(workdir / _RUN_LOCK)):
                return file, is_new
        file.close()  # the lock of a file that was removed while this run waited


def _acquire(file, workdir, wait_s):
    deadline, told = time.monotonic() + wait_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _holder(file) or "another run"
        except OSError:  # a file system without locks
            return
        if time.monotonic() >= deadline:
            raise _in_use(workdir, holder)
        if not told:
            say(f"{workdir} is in use by {holder}; waiting up to {wait_s:g} s for its end ...")
            told = True
        time.sleep(0.5)


def _in_use(workdir, holder):
    return InUse(
        f"--workdir {workdir} is in use by {holder}; wait for its end, or type another --workdir"
    )


def _holder(file):
    """The run that wrote itself into the lock's file, in words; "" if there is none."""
    file.seek(0)
    try:
        return _described(json.loads(file.read()))
    except ValueError:
        return ""


def _described(holder):
    """What `_myself` returned in another process, in words; "" if it is none."""
    try:
        return f"a run on {holder['host']}, process {holder['pid']}, started {holder['started']}"
    except (TypeError, KeyError):
        return ""


def _myself():
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}


def _write(file, holder):
    file.seek(0)
    file.truncate()
    file.write("" if holder is None else json.dumps(holder) + "\n")
    file.flush()


def _now():
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")
