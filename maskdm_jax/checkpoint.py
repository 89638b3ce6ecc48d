"""Checkpoints, by Orbax: saving, restoring, retention, and the digest that compares two runs.

A workdir holds checkpoints/<step>/{state,config,sha256.json}. A save is asynchronous and gets its
final name (in a bucket, Orbax's mark) only once it is complete, so a run killed at any moment still
has its last complete checkpoint. Then each file's SHA-256 is stored beside it, also while training
continues, and compared before use: later damage, by a disk or a copy, is never used in silence.

    python -m maskdm_jax.checkpoint digest WORKDIR [--step N]
"""

import concurrent.futures
import hashlib
import itertools
import pathlib
import socket
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from maskdm_jax.config import from_dict
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import COUNT_OR_0, TEXT, one_of
from maskdm_jax.run import command_line, distributed, faults, files, handlers, hashes
from maskdm_jax.run.progress import remark

_ITEMS = ("params", "ema", "opt_state")
# Orbax looks for the files of a save with glob on the whole path: with [ in it, none are found, and
# with * or ? those of other runs too. TensorStore reads \\ as /.
_PATTERN = frozenset("*?[]\\")
# What Orbax and TensorStore raise for truncated, empty or missing files; JSONDecodeError and
# TensorStore's own errors are ValueErrors.
_DAMAGE = (ValueError, KeyError, FileNotFoundError)
_COMMITTED = "commit_success.txt"  # what Orbax writes last into a checkpoint in a bucket
# Stored with the config. From this format on, a checkpoint without hashes is not finished.
_FORMAT = 2
_UNFINISHED = hashes.DamageError(f"is not finished ({hashes.NAME} is missing)")
_UNKNOWN = "its arrays can be read, but are not known to be unchanged"


def directory(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder of a run's checkpoints.

    Raises:
      ConfigError: for a path that cannot hold checkpoints.
    """
    path = files.place(workdir, "--workdir")
    if not _PATTERN.isdisjoint(str(path)):
        raise ConfigError(
            f"--workdir {path} has one of {' '.join(sorted(_PATTERN))} in it, which Orbax takes "
            "for a pattern; type a --workdir without them"
        )
    return path / "checkpoints"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | pathlib.Path, config, facts: dict | None = None):
        """
        Args:
          workdir: the run's folder.
          config: the run's.
          facts: what else to store beside the config, as JSON.
        """
        self._record = {"format": _FORMAT, "config": config.to_dict(), **(facts or {})}
        self._every, self._directory = config.checkpoint.every_steps, directory(workdir)
        self._saving = None  # (step, bytes) of the save that may still be in progress
        self._hashing = None  # then the future of its hashes
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hashes")
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.checkpoint.keep_last,
                keep_period=config.checkpoint.keep_every_steps or None,
                cleanup_tmp_directories=True,
            ),
            handler_registry=handlers.for_run(),
        )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state, force: bool = False) -> None:
        """Saves if `step` is due by `checkpoint.every_steps` or `force` is set.

        The files are written while training continues. A full disk raises RunError here or in
        `check` or `close`, whichever is called first after the failure.
        """
        self.wait()
        if step == self.latest_step() or not (force or step % self._every == 0):
            return
        self._saving = (step, sum(x.nbytes for x in jax.tree.leaves(state)))
        record = ocp.args.JsonSave(self._record)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), config=record)
        with self._full_disk_explained():
            self._manager.save(step, args=args, force=True)  # Orbax would save the first of all

    def check(self) -> None:
        """Raises RunError if a save has failed since the last call; does not block."""
        if self._saving is None or self._manager.is_saving_in_progress():
            return
        if self._hashing is None:
            self._hash()
        elif self._hashing.done():
            self.wait()

    def restore(self, step: int, abstract_state):
        """The state at `step`, with the shardings of `abstract_state`."""
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        state = ocp.args.PyTreeRestore(item=abstract_state, restore_args=restore_args)
        return self._manager.restore(step, args=ocp.args.Composite(state=state)).state

    def close(self) -> None:
        """Waits for saves in progress, and closes Orbax's manager."""
        self.wait()
        self._pool.shutdown()
        self._manager.close()

    def newest(self) -> str:
        """The checkpoint a run would resume from, in words; waits for saves in progress."""
        self.wait()
        step = self.latest_step()
        return f"step {step} in {self._directory}" if step is not None else "none yet"

    def wait(self) -> None:
        """Waits for the save in progress, with its hashes."""
        if self._saving is None:
            return
        if self._hashing is None:
            self._hash()
        with self._full_disk_explained():
            self._hashing.result()
        self._saving = self._hashing = None

    def _hash(self):
        """Waits for Orbax's commit, which is that of all hosts; process 0 then hashes the files."""
        with self._full_disk_explained():
            self._manager.wait_until_finished()
        folder = self._directory / str(self._saving[0])
        work = hashes.store if distributed.is_main() else str
        self._hashing = self._pool.submit(work, folder)

    def _full_disk_explained(self):
        step, size = self._saving or (None, 0)
        what, remedy = f"checkpoint {step}", lambda: self._remedy(step)
        return faults.explain_full_disk(what, self._directory, remedy, lambda: size)

    def _remedy(self, failed):
        whole = [n for n in steps(self._directory.parent) if n != failed]  # it may lack its hashes
        start = f"resumes from step {whole[-1]}" if whole else "starts again"
        return f"the older checkpoints are whole: make room, then the same command {start}"


def steps(workdir: str | pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in a workdir, ascending."""
    path = directory(workdir)
    if not path.exists():  # for a bucket that does not answer, `is_dir` is False too
        return []
    found = files.holding(path, _COMMITTED) if files.is_remote(path) else path.iterdir()
    return sorted(int(p.name) for p in found if p.name.isdecimal())


def find_step(
    workdir: str | pathlib.Path,
    step: int | None = None,
    set_aside: bool = False,
    instead: str = "another --workdir to start afresh",
) -> int:
    """The step to use: `step`, or that of the newest undamaged checkpoint.

    One process reads each candidate in full, and reports the damaged ones it skips.

    Args:
      workdir: the run.
      step: the step to use; None for the newest.
      set_aside: move damaged, newer checkpoints away, to let the run save those steps again.
      instead: what to type if there is no checkpoint to use.

    Raises:
      ConfigError: if there is no such checkpoint, if `step` or every checkpoint is damaged, or if
        this process does not see the folder that process 0 sees.
    """
    found = distributed.agreed(steps(workdir))
    if not found:
        raise ConfigError(f"{workdir} holds no checkpoint; expected a run's folder; type {instead}")
    if step is not None and step not in found:
        raise ConfigError(f"{workdir} holds steps {found}, not {step}; type --step={found[-1]}")
    candidates = found[::-1] if step is None else [step]
    good = _newest_whole(workdir, candidates, set_aside) if distributed.is_main() else -1
    (good,) = distributed.agreed([good])
    if good >= 0:
        if good in steps(workdir):
            return good
        raise ConfigError(
            f"{workdir} on {socket.gethostname()} has no checkpoint {good}, which process 0 has "
            "there; expected a folder on a file system that all hosts share; type its --workdir"
        )
    if step is not None:
        others = [f"--step={s}" for s in found if s != step] or [instead]
        raise ConfigError(f"checkpoint {step} of {workdir} is damaged; type {' or '.join(others)}")
    raise ConfigError(
        f"every checkpoint in {directory(workdir)} is damaged: {found}; restore one from a copy, "
        f"or type {instead}"
    )


def _newest_whole(workdir, candidates, set_aside):
    """The first of `candidates` that is as it was saved; -1 if there is none."""
    damaged, good = {}, None
    for step in candidates:
        try:
            _verify(workdir, step)
            good = step
            break
        except _DAMAGE as error:
            # A run beside this one may have retired it meanwhile.
            if (directory(workdir) / str(step)).exists():
                reason = " ".join(str(error).split())[:200]
                damaged[step] = reason if error is _UNFINISHED else f"is damaged ({reason})"
    else:  # a kill between the commit of the only checkpoint and its hashes leaves it so
        unfinished = [step for step, fault in damaged.items() if fault == str(_UNFINISHED)]
        good = next((step for step in unfinished if _is_readable(workdir, step)), None)
        if good is not None and set_aside:
            hashes.store(directory(workdir) / str(good))
    for bad, fault in damaged.items():
        then = f"; {_UNKNOWN}" if bad == good else ""
        if good is not None and bad > good:
            then = f"; moved to {_set_aside(workdir, bad)}" if set_aside else ""
            then += f"; using {good}"
        remark(f"checkpoint {bad} of {workdir} {fault}{then}")
    return -1 if good is None else good


def _verify(workdir, step):
    """Reads all of a checkpoint in this process alone; raises one of _DAMAGE if it changed."""
    path = directory(workdir) / str(step)
    if hashes.exist(path):
        hashes.compare(path)
        return
    if "format" in load_record(workdir, step, alone=True):
        raise _UNFINISHED
    for item in _ITEMS:
        restore_item(workdir, step, item, alone=True)
    fault = "was saved without hashes by an earlier version"
    remark(f"checkpoint {step} of {workdir} {fault}; {_UNKNOWN}")


def _is_readable(workdir, step):
    try:
        for item in _ITEMS:
            restore_item(workdir, step, item, alone=True)
    except _DAMAGE:
        return False
    return True


def _set_aside(workdir, step):
    folder = directory(workdir).parent / "damaged_checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([str(step)], (f"{step}.{n}" for n in itertools.count(2)))
    place = next(folder / name for name in names if not (folder / name).exists())
    files.move(directory(workdir) / str(step), place)
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
    with handlers.reader(alone) as checkpointer:
        if abstract is None:
            saved = checkpointer.metadata(path).item_metadata.state
            if saved is None:
                raise FileNotFoundError(f"the description of the arrays in {path} is missing")
            metadata = saved.tree[name]
            abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), metadata)
            as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
            restore_args = jax.tree.map(lambda _: as_numpy, abstract)
        else:
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        state = ocp.args.PyTreeRestore(
            item={name: abstract}, restore_args={name: restore_args}, partial_restore=True
        )
        return checkpointer.restore(path, args=ocp.args.Composite(state=state)).state[name]


def load_config(workdir: str | pathlib.Path, step: int):
    """The config that a checkpoint was made with, stored beside its state."""
    return from_dict(load_record(workdir, step)["config"])


def load_record(workdir: str | pathlib.Path, step: int, alone: bool = False) -> dict:
    """What is stored beside a checkpoint's state: {"config": ...} and the run's facts.

    Earlier versions stored the config alone, without "format".
    """
    path = directory(workdir) / str(step)
    with handlers.reader(alone) as checkpointer:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        record = checkpointer.restore(path, args=args).config
    return record if "format" in record else {"config": record}


def digest(workdir: str | pathlib.Path, step: int | None = None) -> tuple[int, str]:
    """(step, SHA-256 over parameters, EMA and optimizer state) of a checkpoint.

    The hash covers each array's name, dtype, shape and bytes, in the order of the names.
    """
    step = find_step(workdir, step, instead="the workdir of another run")
    sha = hashlib.sha256()
    for item in _ITEMS:
        for path, leaf in jax.tree_util.tree_leaves_with_path(restore_item(workdir, step, item)):
            name = f"{item}{jax.tree_util.keystr(path)}"
            sha.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
            sha.update(np.ascontiguousarray(leaf).tobytes())
    return step, sha.hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = command_line.Parser(__doc__, "python -m maskdm_jax.checkpoint digest WORKDIR")
    parser.flag("command", one_of("digest"), "digest: step and SHA-256 of a checkpoint", "digest")
    parser.flag("workdir", TEXT, "the run", required=True)
    parser.flag("--step", COUNT_OR_0, "the checkpoint's; the newest if not given")

    def print_digest():
        args = parser.parse(argv)
        jax.config.update("jax_platforms", "cpu")
        faults.mute_late_tracebacks()
        print("step {} sha256 {}".format(*digest(args.workdir, args.step)))

    return command_line.exit_code(print_digest)


if __name__ == "__main__":
    sys.exit(main())
