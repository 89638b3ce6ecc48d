"""A study's file, and the runs that a command names.

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

import jax

from maskdm_jax import config_file, phases
from maskdm_jax.config import get
from maskdm_jax.errors import ConfigError
from maskdm_jax.field_table import FIELDS
from maskdm_jax.fields import FREE, nearest_word, quoted
from maskdm_jax.run import files

SECONDS, SEED = 120.0, 0  # of --arms, if none are given
# Each run sets these itself.
_OWN = ("seed", "init.path", "train.num_steps", "phases_by")
# No update depends on these, but a score does.
_SCORING = (
    "sample.sampler", "sample.spacing", "sample.steps", "sample.eta", "sample.weights",
    "sample.guidance_scale", "eval.num", "eval.metrics", "eval.features",
)  # fmt: skip


class Run(NamedTuple):
    """One row: an arm, its budget in device-seconds of training, and its seed."""

    arm: str
    seconds: float
    seed: int


def runs(arms: list[str], seconds: float, seeds: tuple[int, ...] = (SEED,)) -> list[Run]:
    """Every arm with every seed."""
    return [Run(arm, seconds, seed) for seed, arm in itertools.product(seeds, arms)]


def load(path: str):
    """The module of a study.

    Raises:
      ConfigError: for a file that is not a study.
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
        fault = config_file.described_error(error, file)
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
    if fault := config_file.config_fault(study.get_config()):
        return fault
    for name in ("ARMS", "PIECES"):
        if not isinstance(getattr(study, name), dict):
            return f"{name} is {getattr(study, name)!r}, not a dict"
    for name, arm in study.ARMS.items():
        if fault := _arm_fault(arm):
            return f"arm {name} {fault}"
    for name, piece in study.PIECES.items():
        if not isinstance(piece, list) or not all(isinstance(run, Run) for run in piece):
            return f"piece {name} is {piece!r}, not a list of Run(arm, seconds, seed)"
        if unknown := [run.arm for run in piece if run.arm not in study.ARMS]:
            return f"piece {name} has the arm {unknown[0]!r}, which is not in ARMS"
    return None


def _arm_fault(arm):
    """What is wrong with an arm's form; None if nothing."""

    def is_part(part):
        return (
            isinstance(part, (tuple, list))
            and len(part) == 2
            and isinstance(part[0], (int, float))
            and isinstance(part[1], dict)
        )

    if not isinstance(arm, list) or not arm or not all(map(is_part, arm)):
        return f"is {arm!r}, not a list of (share, {{field: value}})"
    if min(share for share, _ in arm) <= 0:
        return f"is {arm!r}, where a share is not above 0"
    if not math.isclose(sum(share for share, _ in arm), 1):
        return f"has shares of the seconds that sum to {sum(s for s, _ in arm):g}, not to 1"
    if unknown := [name for _, fields in arm for name in fields if name not in FIELDS]:
        return f"sets {unknown[0]!r}, which is not a field of the config"
    return None


def with_typed(study, name: str, changes: list[str]) -> list:
    """An arm with those typed changes that make another run of it; see `base` for the others."""
    config, own, fields = study.get_config(), study.get_config(), {}
    for change in changes:
        field = change.partition("=")[0]
        config_file.set_field(config, change)
        if field in _OWN and get(config, field) != get(own, field):
            raise ConfigError(
                f"--config.{change} is typed, but each run sets {field} itself; expected --seeds "
                "or --seconds for it; type the command without --config." + field
            )
        if FIELDS[field].role != FREE:
            fields[field] = get(config, field)
    return [
        (share, given | {k: v for k, v in fields.items() if k in given or get(own, k) != v})
        for share, given in study.ARMS[name]
    ]


def base(study, changes: list[str]):
    """The study's config with those typed changes on which no update depends."""
    config = study.get_config()
    for change in changes:
        field = change.partition("=")[0]
        if field not in FIELDS or FIELDS[field].role == FREE:
            config_file.set_field(config, change)  # refuses one that is not a field
    return config


def configs(study, name: str, changes: list[str]) -> list:
    """The configs of an arm's runs, valid on these devices.

    Args:
      study: its module.
      name: the arm.
      changes: "FIELD=VALUE" for every run of the study.

    Raises:
      ConfigError: for a value that cannot work, with the arm.
    """
    phases.validate(base(study, changes))
    found = []
    for _, fields in with_typed(study, name, changes):
        config = base(study, changes)
        try:
            for field, value in fields.items():
                _set(config, field, value)
            phases.validate(config)
            for mode in ("train", "evaluate"):
                phases.validate_devices(config, jax.device_count(), mode)
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


def difference(before: list | None, now: list | None) -> str:
    """The first fields in which two settings of an arm differ, with both values; "" if none do."""
    if before == now:
        return ""
    old, new = _texts(before), _texts(now)
    differ = [name for name in old | new if old.get(name) != new.get(name)]
    shown = [f"{n} is {old.get(n, 'not set')} and {new.get(n, 'not set')}" for n in differ[:3]]
    return "; ".join(shown)


def _texts(arm):
    return {
        name if part == 1 else f"{name} of run {part}": json.dumps(value)
        for part, (share, fields) in enumerate(arm or (), 1)
        for name, value in {"share": share, **fields}.items()
    }


def read_kept(path: pathlib.Path, kinds: dict[str, type], remedy: str) -> dict:
    """What an earlier start kept in a JSON file.

    Args:
      path: the file, which is there.
      kinds: {name: type} of its entries.
      remedy: for a file that is cut off or damaged, which is refused.
    """
    try:
        kept = json.loads(path.read_text())
        if lacking := [name for name, kind in kinds.items() if not isinstance(kept[name], kind)]:
            raise TypeError(f"{lacking[0]} is {kept[lacking[0]]!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}); expected JSON as studies.compute_matched wrote it; "
            f"{remedy}"
        ) from error
    return kept


def check_settings(study, name: str, changes: list[str], out: pathlib.Path, keep: bool) -> None:
    """Refuses an arm whose config is not the one that this --out began with.

    A row has what an arm changes, so rows of other shared fields would not compare, and an arm's
    name stands for one setting. Runs of a version that did not keep them yet are not compared.

    Args:
      study: its module.
      name: the arm.
      changes: as for `configs`.
      out: the folder of the rows, locked.
      keep: whether to write what is new, since a run of the arm begins.
    """
    path, config = out / "settings.json", base(study, changes)
    shared = {
        field: get(config, field)
        for field, about in FIELDS.items()
        if field in _SCORING or (about.role != FREE and field not in _OWN)
    }
    arm = with_typed(study, name, changes)
    now = json.loads(json.dumps({"shared": shared, "arms": {name: arm}}))
    new, kept = "type --out=FOLDER with a new one", now
    if path.exists():
        remedy = f"{new}, or rm {shlex.quote(str(path))} if no setting has changed since"
        kept = read_kept(path, {"shared": dict, "arms": dict}, remedy)
    new = f"change it back, or {new}"
    for field, value in now["shared"].items():
        before = kept["shared"].get(field, value)
        if before != value:
            raise ConfigError(
                f"{out} has runs with {field} {before!r}, and now it is {value!r} for all arms; "
                f"expected one value in all runs of an --out; {new}"
            )
    if differ := difference(kept["arms"].get(name, now["arms"][name]), now["arms"][name]):
        raise ConfigError(
            f"{out} has runs of {name} with other fields than now: {differ}; expected one setting "
            f"for each arm of an --out; {new}, or give the arm another name"
        )
    if keep:
        kept["arms"] |= now["arms"]
        files.write_text(path, json.dumps(kept, indent=1) + "\n")


def chosen(
    study, piece: str, arms: list[str], seconds: float | None, seeds: list[int]
) -> list[Run]:
    """The runs of a command line."""
    if piece and piece not in study.PIECES:
        near = nearest_word(piece, study.PIECES) or next(iter(study.PIECES), None)
        remedy = f"--piece={quoted(near)}" if near else f"--arms {quoted(next(iter(study.ARMS)))}"
        raise ConfigError(
            f"--piece is {piece!r}; expected one of the study's: {', '.join(study.PIECES)}; type "
            f"{remedy}"
        )
    if piece:
        for flag, given in (("--arms", arms), ("--seconds", seconds), ("--seeds", seeds)):
            if given:
                text = " ".join(map(str, given)) if isinstance(given, list) else f"{given:g}"
                raise ConfigError(
                    f"--piece is {piece!r} and {flag} is {text}; expected a piece, which has arms, "
                    f"seconds and seeds of its own, or --arms; type --piece={quoted(piece)}"
                )
        return study.PIECES[piece]
    unknown = [arm for arm in arms if arm not in study.ARMS]
    if unknown or not arms:
        given = f"--arms has {unknown[0]!r}" if unknown else "neither --piece nor --arms is given"
        near = nearest_word(unknown[0], study.ARMS) if unknown else None
        raise ConfigError(
            f"{given}; expected arms of the study: {', '.join(study.ARMS)}; "
            f"type --arms {quoted(near or next(iter(study.ARMS)))}"
        )
    return runs(arms, seconds or SECONDS, tuple(seeds or (SEED,)))
