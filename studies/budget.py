"""A budget of device-seconds: the steps that fit in it, and what a stopped run keeps of it."""

import itertools
import json
import pathlib
import shlex
import time
from typing import NamedTuple

from benchmarks import measure
from maskdm_jax import flops, phases, sharding, state, step
from maskdm_jax.data import loader
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import files
from maskdm_jax.run.telemetry import read_metrics
from studies.arms import read_kept

_TIMED_S = 3.0  # of steps, for each phase


class Phase(NamedTuple):
    """What a phase of a run cost."""

    tokens: str
    batch: int
    steps: int
    step_ms: float
    gflop_per_image: float


def measured(config, seconds: float, source) -> tuple[list[Phase], list]:
    """The phases of a config, each with as many steps as fit in its share of `seconds` here.

    Beside them their compiled steps: whoever holds these trains without compiling them again.

    Args:
      config: a run's; its phases have shares of the seconds.
      seconds: of training, on all devices at once.
      source: its data set.
    """
    given = config.phases or ((1.0, {}),)
    whole = sum(share for share, _ in given)
    found, steps = [], []
    for (share, _), phase in zip(given, phases.phases(config), strict=True):
        step_s, compiled = step_seconds(phase, source)
        steps.append(compiled)
        found.append(
            Phase(
                flops.tokens_text(phase.config),
                phase.config.train.batch_size,
                max(round(share / whole * seconds / step_s), 1),
                1e3 * step_s,
                flops.training_flops(phase.config) / 1e9,
            )
        )
    return found, steps


def fitted(config, found: list[Phase]):
    """The config with the steps of `found` as `train.num_steps` and as its phases'."""
    config = config.copy_and_resolve_references()
    config.train.num_steps = sum(phase.steps for phase in found)
    config.phases_by = "steps"
    if config.phases:
        changes = [fields for _, fields in config.phases]
        config.phases = tuple(
            (phase.steps, fields) for phase, fields in zip(found, changes, strict=True)
        )
    return config


def step_seconds(phase: phases.Phase, source):
    """(seconds of one training step of a phase, from images of its data set; that step, jitted)."""
    mesh = sharding.make_mesh(phase.config)
    endless = phase.config.copy_and_resolve_references()
    endless.train.num_steps = 10**9  # the feed ends with the run's steps, which are not known yet
    batches = loader.Loader(endless, source, mesh)
    feed, update = batches.batches(0), step.jit_train_step(phase, mesh)
    plan = step.planned(phase, mesh)
    now = [state.init_state(phase.config, mesh)]

    def call(_):
        now[0], metrics = update(now[0], batches.arrays, next(feed), plan)
        return metrics["loss"]

    return measure.seconds_per_call(call, _TIMED_S), update


def trained_seconds(workdir: pathlib.Path) -> float:
    """Seconds of a run's steps, by metrics.jsonl: without compilation, previews and saves."""
    records = read_metrics(workdir)
    steps = [0, *(record["step"] for record in records)]
    pairs = zip(records, itertools.pairwise(steps), strict=True)
    return sum(record["step_s"] * (last - first) for record, (first, last) in pairs)


class Begun:
    """A run that was begun, as DIR/runs/RUN/begun.json keeps it for the next start."""

    def __init__(self, folder: pathlib.Path, what: dict):
        """Reads it.

        Args:
          folder: for the run's workdirs and begun.json.
          what: the run's settings and device, which must be those of the first start.
        """
        self._path, what = folder / "begun.json", json.loads(json.dumps(what))
        self._kept = {"what": what, "seconds": 0.0, "phases": []}
        anew = f"type rm -r {shlex.quote(str(folder))} to begin anew"
        if self._path.exists():
            kinds = {name: type(value) for name, value in self._kept.items()}
            self._kept = read_kept(self._path, kinds, anew)
        for name, before in self._kept["what"].items():
            if before != what[name]:
                raise ConfigError(
                    f"{folder} was begun with the {name} {json.dumps(before)}, and now it is "
                    f"{json.dumps(what[name])}; go on with the first, or {anew}"
                )
        self._start = time.perf_counter()

    def phases(self, index: int) -> list[Phase]:
        """Those of the arm's part with that index; none if they were not measured yet."""
        return [Phase(**phase) for phases in self._kept["phases"][index:][:1] for phase in phases]

    def add(self, found: list[Phase]) -> None:
        """Keeps the phases of the arm's next part."""
        self._kept["phases"].append([phase._asdict() for phase in found])
        self.keep()

    def seconds(self) -> float:
        """Of all starts so far; those of a start that was killed count to its last `keep`."""
        return self._kept["seconds"] + time.perf_counter() - self._start

    def keep(self) -> None:
        """Writes begun.json."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(self._path, json.dumps(self._kept | {"seconds": self.seconds()}))
