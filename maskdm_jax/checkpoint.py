"""All of Orbax: saving, restoring, retention, and the digest by which two runs are compared.

A workdir holds checkpoints/<step>/{state,config}. A save is asynchronous and appears under its own
name only when it is whole, so a run that is killed at any moment finds its last whole one.

    python -m maskdm_jax.checkpoint digest WORKDIR [--step N]
"""

import argparse
import hashlib
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from maskdm_jax.config import ConfigError, from_dict


def directory(workdir: str | pathlib.Path) -> pathlib.Path:
    """Where a run keeps its checkpoints."""
    return pathlib.Path(workdir).expanduser().absolute() / "checkpoints"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | pathlib.Path, config):
        self._config = config.to_dict()
        self._manager = ocp.CheckpointManager(
            directory(workdir),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=config.checkpoint.every_steps,
                max_to_keep=config.checkpoint.keep_last,
                keep_period=config.checkpoint.keep_every_steps or None,
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state, force: bool = False) -> None:
        """Saves where `step` is due by `checkpoint.every_steps`, or `force` is set."""
        if step == self._manager.latest_step():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(self._config)
        )
        self._manager.save(step, args=args, force=force)

    def restore(self, step: int, abstract_state):
        """The state at `step`, laid out as `abstract_state`'s shardings say."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=args).state

    def close(self) -> None:
        """Waits for saves in progress."""
        self._manager.wait_until_finished()
        self._manager.close()


def steps(workdir: str | pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints in a workdir, ascending."""
    path = directory(workdir)
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdecimal())


def find_step(workdir: str | pathlib.Path, step: int | None = None) -> int:
    """`step`, or the newest; raises ConfigError where there is no such checkpoint."""
    found = steps(workdir)
    if not found:
        raise ConfigError(
            f"{workdir} holds no checkpoint; expected a --workdir that training wrote"
        )
    if step is not None and step not in found:
        raise ConfigError(f"{workdir} holds no checkpoint of step {step}; it holds {found}")
    return found[-1] if step is None else step


def restore_item(workdir: str | pathlib.Path, step: int, name: str, abstract=None):
    """One entry of a checkpoint's state ("params", "ema", ...), and nothing else of it.

    Args:
      workdir: the run.
      step: of a whole checkpoint there.
      name: the entry.
      abstract: ShapeDtypeStructs with shardings to restore to; None for NumPy arrays in whatever
        shape they were saved.
    """
    path = directory(workdir) / str(step)
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), config=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as checkpointer:
        if abstract is None:
            metadata = checkpointer.metadata(path).item_metadata.state.tree[name]
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


def load_config(workdir: str | pathlib.Path, step: int):
    """The config that a checkpoint was made with, stored beside its state."""
    path = directory(workdir) / str(step)
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), config=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return from_dict(checkpointer.restore(path, args=args).config)


def digest(workdir: str | pathlib.Path, step: int | None = None) -> tuple[int, str]:
    """(step, SHA-256 over parameters, EMA and optimizer state) of a checkpoint.

    The hash covers each array's name, dtype, shape and bytes, in the order of the names.
    """
    step = find_step(workdir, step)
    sha = hashlib.sha256()
    for item in ("params", "ema", "opt_state"):
        tree = restore_item(workdir, step, item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{item}{jax.tree_util.keystr(path)}"
            sha.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
            sha.update(np.ascontiguousarray(leaf).tobytes())
    return step, sha.hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m maskdm_jax.checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("digest", help="step and SHA-256 of a checkpoint")
    command.add_argument("workdir")
    command.add_argument("--step", type=int, help="default: the newest")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        step, sha = digest(args.workdir, args.step)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"step {step} sha256 {sha}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
