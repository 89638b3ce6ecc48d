"""Averages of the weights over training: the EMA, and power-function averages of any length.

Karras et al. 2024 (EDM2, section 3): with weights proportional to t^gamma, an average's length is a
fixed share of the training so far; its `std` is the standard deviation of that profile in units of
the training time. A run with `optim.ema = "power"` keeps two of them and stores snapshots of both;
any other length is the combination of snapshots whose profile is nearest, by least squares.
"""

import functools
import pathlib
from collections.abc import Iterable

import jax
import numpy as np

from maskdm_jax import checkpoint, phases
from maskdm_jax.errors import ConfigError
from maskdm_jax.optim import POWER_STDS, power_gamma
from maskdm_jax.run import distributed, files, hashes
from maskdm_jax.run.progress import say

_FOLDER = "ema_snapshots"
_MAX_MISFIT = 0.1


class Snapshots:
    """Stores the two averages of a run every `optim.ema_snapshot_steps`, and keeps all."""

    def __init__(self, workdir: str | pathlib.Path, config, first_step: int):
        """Removes what an earlier process stored beyond `first_step`, or did not finish.

        Args:
          workdir: the run's folder.
          config: the run's, with `optim.ema` "power".
          first_step: completed updates at the start.
        """
        self._workdir, self._every_steps = folder(workdir), config.optim.ema_snapshot_steps
        if distributed.is_main():
            for step in checkpoint.steps(self._workdir):
                place = checkpoint.directory(self._workdir) / str(step)
                if step > first_step or not hashes.exist(place):
                    beyond = f"it is beyond step {first_step}, from which the run resumes"
                    reason = beyond if step > first_step else f"{hashes.NAME} is missing in it"
                    say(f"removing the snapshot of the averages {place}: {reason}")
                    files.remove_tree(place)
        distributed.agreed([0])  # the others wait for that
        config = config.copy_and_resolve_references()
        config.checkpoint.update(every_steps=1, keep_last=2**31, keep_every_steps=0)
        self._store = checkpoint.Checkpoints(self._workdir, config)

    def save(self, step: int, ema: dict) -> None:
        """Stores a snapshot if `step` is due, and waits for it: later checkpoints count on it."""
        if step % self._every_steps == 0:
            self._store.save(step, ema, force=True)
            self._store.wait()

    def close(self) -> None:
        """Closes Orbax's manager."""
        self._store.close()


def folder(workdir: str | pathlib.Path) -> pathlib.Path:
    """Where a run's snapshots are."""
    return files.as_place(workdir) / _FOLDER


def kept(ema, config):
    """The average to draw and score with in training: the EMA, or the shorter power average."""
    return ema["short"] if config.optim.ema == "power" else ema


def snapshot_bytes(ema, every_phase: Iterable[phases.Phase]) -> int:
    """The room that all snapshots of a run take."""
    num = 0
    for phase in every_phase:
        every = phase.config.optim.ema_snapshot_steps
        num += phase.last_step // every - phase.first_step // every
    return num * sum(x.nbytes for x in jax.tree.leaves(ema))


def check_std(config, std: float, field: str = "sample.ema_std") -> None:
    """Raises ConfigError if a run of `config` cannot give an average of that length."""
    if std and config.optim.ema != "power":
        raise ConfigError(
            f"{field} is {std:g}, but this run keeps one EMA of optim.ema_decay "
            f"{config.optim.ema_decay:g}; expected 0, or a run trained with "
            f"--config.optim.ema=power; type --config.{field}=0"
        )


def restore(config, workdir: str | pathlib.Path, step: int, abstract, std: float = 0.0):
    """The averaged weights at a checkpoint.

    Args:
      config: the run's.
      workdir: the run's folder.
      step: of the checkpoint.
      abstract: ShapeDtypeStructs with shardings, of the parameters.
      std: length of the average, for a run with `optim.ema` "power"; 0 for what training kept: the
        EMA, or the shorter power average.

    Raises:
      ConfigError: for a std that this run cannot give.
    """
    check_std(config, std)
    if config.optim.ema != "power":
        return checkpoint.restore_item(workdir, step, "ema", abstract)
    load = functools.partial(_load, abstract=abstract)
    if not std:
        return load(workdir, step, "ema")["short"]
    # Power averages start anew with each phase of a run.
    begun = phases.at(checkpoint.load_config(workdir, step), step).first_step
    return _combined(_stored(workdir, begun, step), load, step, std, begun)


def _stored(workdir, begun, step):
    """(run, step, item) of the averages after `begun`, up to `step`: the snapshots', and the
    checkpoint's own."""
    taken = [s for s in distributed.agreed(checkpoint.steps(folder(workdir))) if begun < s < step]
    for each in taken:
        checkpoint.find_step(folder(workdir), each)  # compares its hashes
    return [(folder(workdir), s, None) for s in taken] + [(workdir, step, "ema")]


def _load(workdir, step, item, abstract):
    both = dict.fromkeys(POWER_STDS, abstract)
    if item is not None:
        return checkpoint.restore_item(workdir, step, item, both)
    return {name: checkpoint.restore_item(workdir, step, name, abstract) for name in both}


def _combined(stored, load, step, std, begun=0):
    gammas = {name: power_gamma(value) for name, value in POWER_STDS.items()}
    profiles = [(s - begun, gamma) for _, s, _ in stored for gamma in gammas.values()]
    coefficients, misfit = _least_squares(profiles, (step - begun, power_gamma(std)))
    if misfit > _MAX_MISFIT:
        raise ConfigError(
            f"sample.ema_std is {std:g}, but the averages of {len(stored)} steps up to {step} give "
            f"that profile with an error of {misfit:.0%}; expected at most {_MAX_MISFIT:.0%}; type "
            f"a value nearer to 0.05 and 0.1, such as --config.sample.ema_std=0.08, or train with "
            "fewer --config.optim.ema_snapshot_steps"
        )
    coefficients = iter(coefficients)
    total = None
    for place in stored:
        for tree in [load(*place)[name] for name in gammas]:
            scale = functools.partial(jax.numpy.multiply, np.float32(next(coefficients)))
            scaled = jax.tree.map(scale, tree)
            total = scaled if total is None else jax.tree.map(jax.numpy.add, total, scaled)
    return total


def _least_squares(profiles, target):
    """Coefficients of `profiles` whose sum is nearest to `target`, float64, and the distance that
    remains, relative to the target."""
    gram = np.array([[_product(a, b) for b in profiles] for a in profiles])
    right = np.array([_product(a, target) for a in profiles])
    # By pseudo-inverse: neighbouring profiles are nearly the same.
    found = np.linalg.lstsq(gram, right, rcond=1e-12)[0]
    whole = _product(target, target)
    left = whole - 2 * found @ right + found @ gram @ found
    return found, float(np.sqrt(max(left, 0) / whole))


def _product(a, b):
    """The integral of two profiles' product; (T, gamma) is (gamma + 1) t^gamma / T^(gamma + 1) on
    [0, T]."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    t = min(t_a, t_b)
    shares = (t / t_a) ** (gamma_a + 1) * (t / t_b) ** (gamma_b + 1)
    return shares * (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * t)
