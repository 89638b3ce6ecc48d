"""A study's file, and the runs that a command asks of it.

A study is a Python file with

- get_config(): what all its arms share, as in configs/;
- ARMS: {name: runs}, where each run is (share of the seconds, {field: value}), and all but the
  first start from the weights of the one before;
- PIECES: {name: list of `Run`}, the lists that --piece names; `runs` makes them.
"""

import importlib.util
import itertools
import json
import math
import pathlib
import shlex
from typing import NamedTuple

from maskdm_jax import config_file, phases
from maskdm_jax.config import get
from maskdm_jax.errors import ConfigError
from maskdm_jax.field_table import FIELDS
from maskdm_jax.fields import FREE
from maskdm_jax.run import files

_SECONDS, _SEEDS = 120.0, (0,)


class Run(NamedTuple):
    """One row: an arm, its budget in device-seconds of training, and its seed."""

    arm: str
    seconds: float
    seed: int


def runs(
    arms: list[str], seconds: float | None = None, seeds: tuple[int, ...] | None = None
) -> list[Run]:
    """Every arm with every seed; by default for 120 s, with seed 0."""
    pairs = itertools.product(seeds or _SEEDS, arms)
    return [Run(arm, seconds or _SECONDS, seed) for seed, arm in pairs]


def load(path: str):
    """The module of a study.

    Raises:
      ConfigError: for a file that is none.
    """
    file = files.local_path(path, "--study")
    example = "type --study=studies/faces128.py"
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(
            f"--study is {path!r}, which is no Python file; expected one with get_config(), ARMS "
            f"and PIECES; {example}"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        fault = _fault(module)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        fault = config_file.raised(error, file)
    if fault:
        raise ConfigError(
            f"--study {path}: {fault}; expected get_config(), ARMS and PIECES, as in "
            f"studies/faces128.py; correct the file, or {example}"
        )
    return module


def _fault(study):
    """What is wrong with a study's module; None if nothing."""
    if lacking := [name for name in ("get_config", "ARMS", "PIECES") if not hasattr(study, name)]:
        return f"it has no {' and no '.join(lacking)}"
    if fault := config_file.fault(study.get_config()):
        return fault
    for name in ("ARMS", "PIECES"):
        if not isinstance(getattr(study, name), dict) or not getattr(study, name):
            return f"{name} is {getattr(study, name)!r}, not a dict of them by name"
    for name, arm in study.ARMS.items():
        if fault := _arm_fault(arm):
            return f"arm {name} {fault}"
    for name, asked in study.PIECES.items():
        if unknown := [run.arm for run in asked if run.arm not in study.ARMS]:
            return f"piece {name} has the arm {unknown[0]!r}, which is not in ARMS"
    return None


def _arm_fault(arm):
    """What is wrong with an arm's form; None if nothing."""
    try:
        pairs = [(float(share), dict(fields)) for share, fields in arm]
    except (TypeError, ValueError):
        return f"is {arm!r}, not a list of (share, {{field: value}})"
    if not pairs or min(share for share, _ in pairs) <= 0:
        return f"is {arm!r}, where a share is not above 0"
    if not math.isclose(sum(share for share, _ in pairs), 1):
        return f"has shares of the seconds that sum to {sum(s for s, _ in pairs):g}, not to 1"
    if unknown := [name for _, fields in pairs for name in fields if name not in FIELDS]:
        return f"sets {unknown[0]!r}, which is not a field of the config"
    return None


def with_typed(study, arm: list, changes: list[str]) -> tuple[list, list[str]]:
    """(the arm with those typed changes that make another run of it, the other changes)."""
    config, own, fields, free = study.get_config(), study.get_config(), {}, []
    for change in changes:
        name = change.partition("=")[0]
        config_file.set_field(config, change)
        if FIELDS[name].role == FREE:
            free.append(change)
        else:
            fields[name] = get(config, name)
    typed = [
        {k: v for k, v in fields.items() if k in given or get(own, k) != v} for _, given in arm
    ]
    return [(share, given | more) for (share, given), more in zip(arm, typed, strict=True)], free


def configs(study, name: str, changes: list[str]) -> list:
    """The valid configs of an arm's runs.

    Args:
      study: its module.
      name: the arm.
      changes: "FIELD=VALUE" for every run of the study.

    Raises:
      ConfigError: for a value that cannot work, with the arm.
    """
    arm, free = with_typed(study, study.ARMS[name], changes)
    found = []
    for _, fields in arm:
        config = study.get_config()
        try:
            for field, value in fields.items():
                _set(config, field, value)
            for change in free:
                config_file.set_field(config, change)
            phases.validate(config)
        except ConfigError as error:
            fault = str(error).partition("; type ")[0]
            typed = " or what was typed for its fields" if changes else ""
            raise ConfigError(
                f"arm {name} of {study.__file__}: {fault}; correct the arm{typed}, then type the "
                "command again"
            ) from error
        found.append(config)
    return found


def _set(config, field, value):
    try:
        config.update_from_flattened_dict({field: value})
    except TypeError as error:
        kind = FIELDS[field].kind
        raise ConfigError(f"{field} is {value!r}; expected {kind.expected}") from error


def shared_fields(study) -> dict:
    """The fields of get_config() on which an update depends, as JSON has them."""
    config = study.get_config()
    fields = {name: get(config, name) for name, field in FIELDS.items() if field.role != FREE}
    return json.loads(json.dumps(fields))


def check_shared(study, path: pathlib.Path) -> None:
    """Refuses a study whose get_config() is not that of the runs before, which `path` keeps.

    Rows tell what an arm changes, so with another get_config() they would not compare.
    """
    now = shared_fields(study)
    if not path.exists():
        files.write_text(path, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    differing = [name for name in now if before.get(name, now[name]) != now[name]]
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{path.parent} has runs of a get_config() with {name} {before[name]!r}, and in "
            f"{study.__file__} it is {now[name]!r}; expected one get_config() for all rows of an "
            "--out; change it back, or type --out=FOLDER with a new one"
        )


def chosen(
    study, piece: str, arms: list[str], seconds: float | None, seeds: list[int] | None
) -> list[Run]:
    """The runs that the command line asks for."""
    if piece:
        for flag, given in (("--arms", arms), ("--seconds", seconds), ("--seeds", seeds)):
            if given:
                text = " ".join(map(str, given)) if isinstance(given, list) else f"{given:g}"
                raise ConfigError(
                    f"--piece is {piece!r} and {flag} is {text}; expected a piece, which has arms, "
                    f"seconds and seeds of its own, or --arms; type --piece={shlex.quote(piece)}"
                )
        if piece not in study.PIECES:
            raise ConfigError(
                f"--piece is {piece!r}; expected one of {', '.join(study.PIECES)}; "
                f"type --piece={next(iter(study.PIECES))}"
            )
        return study.PIECES[piece]
    unknown = [arm for arm in arms if arm not in study.ARMS]
    if unknown or not arms:
        given = f"--arms has {unknown[0]!r}" if unknown else "neither --piece nor --arms is given"
        raise ConfigError(
            f"{given}; expected arms of the study: {', '.join(study.ARMS)}; "
            f"type --arms {next(iter(study.ARMS))}"
        )
    return runs(arms, seconds, tuple(seeds or ()))
