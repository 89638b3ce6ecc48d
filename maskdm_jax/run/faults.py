"""Faults that stop a run: numbers that are not finite, and a full disk."""

import contextlib
import errno
import os
import pathlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator

from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.run import files

# A full disk, a used-up quota, a file-size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SkipCounter:
    """Counts updates that were not applied."""

    def __init__(self, max_in_a_row: int, checkpoints, total: int = 0):
        """
        Args:
          max_in_a_row: the number of skipped updates in a row that stops the run.
          checkpoints: the run's; the error names the newest.
          total: updates that the run has skipped so far.
        """
        self._max_in_a_row = max_in_a_row
        self._checkpoints = checkpoints
        self._in_a_row = 0
        self.total = total

    def count(self, step: int, skipped: bool) -> None:
        """Counts the update that completed `step`; RunError after too many skips in a row."""
        if not skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.total += 1
        if self._in_a_row >= self._max_in_a_row:
            first = step - self._in_a_row + 1
            raise RunError(
                f"loss or gradients were not finite from step {first} to {step}, "
                f"{self._in_a_row} in a row (train.max_skipped_steps); none was applied; the "
                f"newest checkpoint is {self._checkpoints.newest()}; the same command would fail: "
                "type a lower --config.optim.lr_peak, --config.optim.clip_norm=1 or "
                "--config.model.dtype=float32"
            )


def check_finite(params, source: str, instead: str) -> None:
    """Raises ConfigError, with the first name, if some of `params` are not finite.

    Args:
      params: a tree of arrays, which may be spread over devices.
      source: where they are from.
      instead: what to type.
    """
    import jax  # slow to load, and `prepare` loads this module too
    import jax.numpy as jnp

    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params), strict=True)
    finite = jax.jit(lambda leaves: jnp.stack([jnp.isfinite(x).all() for x in leaves]))(leaves)
    bad = [path for path, is_finite in zip(paths, finite.tolist(), strict=True) if not is_finite]
    if bad:
        name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
        raise ConfigError(
            f"{len(bad)} of {len(paths)} parameters of {source} have values that are not finite, "
            f"{name} first; expected finite numbers; type {instead}"
        )


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception means that there was no room to write.

    TensorStore raises ValueError and ArrayRecord RuntimeError, with the system's error in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(os.strerror(code) in str(error) for code in _FULL)


@contextlib.contextmanager
def explain_full_disk(
    what: str,
    where: str | pathlib.Path,
    remedy: str | Callable[[], str],
    needed_bytes: Callable[[], int] | None = None,
) -> Iterator[None]:
    """Raises RunError, in these words, if the block finds the disk full.

    Args:
      what: what could not be written.
      where: the folder it goes to.
      remedy: what to do; or what returns that, called after the failure.
      needed_bytes: returns about how much room it takes in all; called after the failure.
    """
    try:
        yield
    except RunError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if not disk_is_full(error):
            raise
        known = (os.strerror(code) for code in _FULL)
        reason = next((words for words in known if words in str(error)), str(error))
        room = ""
        if needed_bytes is not None:
            disk = tempfile.gettempdir() if files.is_remote(where) else _existing(where)
            needed, free = needed_bytes() / 2**20, shutil.disk_usage(disk).free / 2**20
            room = f"about {needed:,.1f} MiB are needed, and {free:,.1f} MiB are free; "
        remedy = remedy() if callable(remedy) else remedy
        raise RunError(
            f"{what} could not be written to {where}: {reason}; {room}{remedy}"
        ) from error


def _existing(folder):
    """The innermost of a folder and those above it that is there."""
    path = pathlib.Path(folder).absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def mute_late_tracebacks() -> None:
    """Mutes the stack traces of Orbax's pending reads and writes once one of them has failed.

    The first error is raised as usual; the others then find their event loop closed, and each would
    print a stack trace. Affects the whole process.
    """
    show = sys.unraisablehook

    def show_others(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = show_others
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
