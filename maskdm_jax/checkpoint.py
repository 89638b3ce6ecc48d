"""Checkpoints, by Orbax: saving, restoring, retention, and the digest that compares two runs.

A workdir holds checkpoints/<step>/{state,config}. A save is asynchronous and gets its final name
only once it is complete, so a run killed at any moment still has its last complete checkpoint.
Later damage, by a disk or a copy, is found by reading the whole checkpoint before it is used.

    python -m maskdm_jax.checkpoint digest WORKDIR [--step N]
"""

import argparse
import hashlib
import itertools
import os
import pathlib
import shutil
import socket
import sys
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp

from maskdm_jax.config import from_dict
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import command_line, distributed, faults
from maskdm_jax.run.progress import remark

_ITEMS = ("params", "ema", "opt_state")
# What Orbax and TensorStore raise for truncated, empty or missing files; JSONDecodeError and
# TensorStore's own errors are ValueErrors.
_DAMAGE = (ValueError, KeyError, FileNotFoundError)


def directory(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder of a run's checkpoints."""
    return pathlib.Path(workdir).expanduser().absolute() / "checkpoints"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | pathlib.Path, config):
        self._config = config.to_dict()
        self._directory = directory(workdir)
        self._saving = None  # (step, bytes) of the save that may still be in progress
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=config.checkpoint.every_steps,
                max_to_keep=config.checkpoint.keep_last,
                keep_period=config.checkpoint.keep_every_steps or None,
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state, force: bool = False) -> None:
        """Saves if `step` is due by `checkpoint.every_steps` or `force` is set.

        The files are written while training continues. A full disk raises RunError here or in
        `check` or `close`, whichever is called first after the failure.
        """
        self._wait()
        if step == self._manager.latest_step():
            return
        self._saving = (step, sum(x.nbytes for x in jax.tree.leaves(state)))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(self._config)
        )
        with self._full_disk_explained():
            self._manager.save(step, args=args, force=force)

    def check(self) -> None:
        """Raises RunError if a save has failed since the last call; does not block."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._wait()

    def restore(self, step: int, abstract_state):
        """The state at `step`, with the shardings of `abstract_state`."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=args).state

    def close(self) -> None:
        """Waits for saves in progress, and closes Orbax's manager."""
        self._wait()
        self._manager.close()

    def newest(self) -> str:
        """The checkpoint a run would resume from, in words; waits for saves in progress."""
        self._wait()
        step = self.latest_step()
        return f"step {step} in {self._directory}" if step is not None else "none yet"

    def _wait(self):
        with self._full_disk_explained():
            self._manager.wait_until_finished()
        self._saving = None

    def _full_disk_explained(self):
        step, size = self._saving or (None, 0)
        whole = steps(self._directory.parent)
        free = shutil.disk_usage(self._directory).free
        start = f"resumes from step {whole[-1]}" if whole else "starts again"
        return faults.explain_full_disk(
            f"checkpoint {step}",
            self._directory,
            f"it takes about {size / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free; the "
            f"older checkpoints are whole: make room, then the same command {start}",
        )


def steps(workdir: str | pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in a workdir, ascending."""
    path = directory(workdir)
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdecimal())


def find_step(workdir: str | pathlib.Path, step: int | None = None, set_aside: bool = False) -> int:
    """The step to use: `step`, or that of the newest undamaged checkpoint.

    One process reads each candidate in full, and reports the damaged ones it skips.

    Args:
      workdir: the run.
      step: the step to use; None for the newest.
      set_aside: move damaged, newer checkpoints to <workdir>/damaged_checkpoints, to let the run
        save those steps again.

    Raises:
      ConfigError: if there is no such checkpoint, if `step` or every checkpoint is damaged, or if
        this process does not see the folder that process 0 sees.
    """
    found = distributed.agreed(steps(workdir))
    if not found:
        raise ConfigError(
            f"{workdir} holds no checkpoint; expected a --workdir that training wrote"
        )
    if step is not None and step not in found:
        raise ConfigError(f"{workdir} holds no checkpoint of step {step}; it holds {found}")
    candidates = found[::-1] if step is None else [step]
    good = -1
    if distributed.is_main():
        good = _newest_whole(workdir, candidates, set_aside)
    (good,) = distributed.agreed([good])
    if good >= 0 and good not in steps(workdir):
        raise ConfigError(
            f"{workdir} on {socket.gethostname()} has no checkpoint {good}, which process 0 has "
            "there; expected a folder on a file system that all hosts share"
        )
    if good >= 0:
        return good
    if step is not None:
        others = [s for s in found if s != step]
        raise ConfigError(f"checkpoint {step} of {workdir} is damaged; others there: {others}")
    raise ConfigError(
        f"every checkpoint in {directory(workdir)} is damaged: {found}; restore one from a copy, "
        "or type another --workdir to start afresh"
    )


def _newest_whole(workdir, candidates, set_aside):
    """The first readable one of `candidates`; -1 if there is none."""
    damaged = {}
    for step in candidates:
        try:
            _read_all(workdir, step)
        except _DAMAGE as error:
            damaged[step] = " ".join(str(error).split())[:200]
            continue
        for bad, reason in damaged.items():
            place = f"; moved to {_set_aside(workdir, bad)}" if set_aside else ""
            remark(f"checkpoint {bad} of {workdir} is damaged ({reason}){place}; using {step}")
        return step
    for bad, reason in damaged.items():
        remark(f"checkpoint {bad} of {workdir} is damaged ({reason})")
    return -1


def _read_all(workdir, step):
    """Reads every array and the config in this process alone; raises one of _DAMAGE."""
    load_config(workdir, step, alone=True)
    for item in _ITEMS:
        restore_item(workdir, step, item, alone=True)


def _set_aside(workdir, step):
    folder = directory(workdir).parent / "damaged_checkpoints"
    folder.mkdir(exist_ok=True)
    names = itertools.chain([str(step)], (f"{step}.{n}" for n in itertools.count(2)))
    place = next(folder / name for name in names if not (folder / name).exists())
    os.rename(directory(workdir) / str(step), place)
    return place


def restore_item(
    workdir: str | pathlib.Path, step: int, name: str, abstract=None, alone: bool = False
):
    """Restores only one entry of a checkpoint's state ("params", "ema", ...).

    Args:
      workdir: the run.
      step: of a complete checkpoint there.
      name: the entry.
      abstract: ShapeDtypeStructs with shardings to restore to; None for NumPy arrays of the saved
        shapes.
      alone: True if only this process reads.
    """
    path = directory(workdir) / str(step)
    with _reader(alone) as checkpointer:
        if abstract is None:
            saved = checkpointer.metadata(path).item_metadata.state
            if saved is None:
                raise FileNotFoundError(f"the description of the arrays in {path} is missing")
            metadata = saved.tree[name]
            abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), metadata)
            restore_args = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract
            )
        else:
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        state = ocp.args.PyTreeRestore(
            item={name: abstract}, restore_args={name: restore_args}, partial_restore=True
        )
        return checkpointer.restore(path, args=ocp.args.Composite(state=state)).state[name]


def load_config(workdir: str | pathlib.Path, step: int, alone: bool = False):
    """The config stored with a checkpoint."""
    path = directory(workdir) / str(step)
    with _reader(alone) as checkpointer:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return from_dict(checkpointer.restore(path, args=args).config)


def _reader(alone):
    options = ocp.options.MultiprocessingOptions()
    if alone:  # otherwise Orbax waits for the other processes
        options = ocp.options.MultiprocessingOptions(
            active_processes={jax.process_index()}, barrier_sync_key_prefix="alone"
        )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
        config=ocp.JsonCheckpointHandler(multiprocessing_options=options),
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def digest(workdir: str | pathlib.Path, step: int | None = None) -> tuple[int, str]:
    """(step, SHA-256 over parameters, EMA and optimizer state) of a checkpoint.

    The hash covers each array's name, dtype, shape and bytes, in the order of the names.
    """
    step = find_step(workdir, step)
    sha = hashlib.sha256()
    for item in _ITEMS:
        tree = restore_item(workdir, step, item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{item}{jax.tree_util.keystr(path)}"
            sha.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
            sha.update(np.ascontiguousarray(leaf).tobytes())
    return step, sha.hexdigest()


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m maskdm_jax.checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("digest", help="step and SHA-256 of a checkpoint")
    command.add_argument("workdir")
    command.add_argument("--step", type=int, help="default: the newest")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    mute_late_tracebacks()
    return command_line.exit_code(
        lambda: print("step {} sha256 {}".format(*digest(args.workdir, args.step)))
    )


if __name__ == "__main__":
    sys.exit(main())
