"""The config of a command: a file in configs/, then what --config.FIELD=VALUE changes in it.

The files of configs/ are found from any folder, under their path or their name alone, and any
config file may import them (`from configs import pretrain_digits`).

A file with variants declares their names, such as ARGUMENTS = ("ours", "paper"), and its
get_config(argument) makes each. `--config=FILE:paper` chooses one; FILE alone means the first.
"""

import contextlib
import importlib.util
import pathlib
import runpy
import sys
import traceback
import types
from collections.abc import Iterable, Iterator

from ml_collections import config_dict

from maskdm_jax import phases
from maskdm_jax.config import FIELDS, differences, framework_of, get, is_used
from maskdm_jax.errors import ConfigError, OtherRecipe
from maskdm_jax.fields import nearest_word, quoted, typed
from maskdm_jax.run import files

_EXAMPLE = "configs/pretrain_digits.py"
_PACKAGE = pathlib.Path(__file__).parent
# A wheel has configs/ inside the package, a checkout beside it.
_SHIPPED = next(each for each in (_PACKAGE, _PACKAGE.parent) if (each / "configs").is_dir())


def load(path: str, changes: Iterable[str] = ()) -> config_dict.ConfigDict:
    """The valid, locked config of a command.

    Args:
      path: a Python file with a function get_config(), or FILE:ARGUMENT; or the name of a file in
        configs/, without its suffix.
      changes: "FIELD=VALUE" each; the last one of a field counts.

    Raises:
      ConfigError: for a file that gives no config, and for a change or a value that cannot work.
    """
    config = _from_file(path)
    for change in {change.partition("=")[0]: change for change in changes}.values():
        set_field(config, change)
    phases.validate(config)
    _check_effect(config, changes)
    return config


def shipped() -> list[str]:
    """The paths of the files in configs/, which `load` takes in any folder."""
    files = (_SHIPPED / "configs").glob("[a-z]*.py")
    return sorted(str(path.relative_to(_SHIPPED)) for path in files)


def arguments(path: str) -> tuple[str, ...]:
    """The arguments that a file takes after `FILE:`; FILE alone means the first."""
    file = _found(path)
    with _configs_importable(file):
        return runpy.run_path(str(file)).get("ARGUMENTS", ())


@contextlib.contextmanager
def naming_recipe(path: str, changes: Iterable[str] = ()) -> Iterator[None]:
    """Inside, the refusal of a stored run also names the FILE:ARGUMENT that has the run's values.

    Args: as for `load`.
    """
    try:
        yield
    except OtherRecipe as error:
        file = _split(path)[0]
        typed = (f"{file}:{argument}" for argument in arguments(file))
        fitting = next((each for each in typed if _has_values(each, changes, error)), None)
        if fitting is None:
            raise
        raise ConfigError(f"{error}, or --config={fitting}, which has these values") from error


def _has_values(path, changes, error):
    """Whether the config has the stored run's values of the fields that an OtherRecipe names."""
    try:
        differing = differences(load(path, changes), error.stored)
    except ConfigError:  # the typed changes do not suit this recipe
        return False
    return bool(error.names) and not set(error.names) & set(differing)


def set_field(config: config_dict.ConfigDict, change: str) -> None:
    """Sets a field of `config` from a typed "FIELD=VALUE".

    Raises:
      ConfigError: for an unknown field, with the nearest name; for a value that it does not take.
    """
    name, has_value, text = change.partition("=")
    if name not in FIELDS:
        near = _nearest_field(name)
        remedy = f"--config.{near}={quoted(text)}" if near else "--help"
        raise ConfigError(
            f"--config.{name} is not a field of the config; expected one of those that --help "
            f"lists; type {remedy}"
        )
    kind, now = FIELDS[name].kind, get(config, name)
    suggestion = now if kind.accepts(now) else FIELDS[name].default
    if not has_value:
        raise ConfigError(
            f"--config.{name} has no value; expected {kind.expected}; type "
            f"--config.{name}={quoted(suggestion)}"
        )
    value = typed(f"--config.{name}", text, kind, suggestion)
    group, _, leaf = name.rpartition(".")
    (config[group] if group else config)[leaf] = value


def _nearest_field(name):
    leaves = {field.rpartition(".")[2]: field for field in FIELDS}
    leaf = name.rpartition(".")[2]
    return leaves.get(leaf) or nearest_word(name, FIELDS) or leaves.get(nearest_word(leaf, leaves))


def _check_effect(config, changes):
    """Raises ConfigError for a typed field that nothing reads: every phase sets it to something
    else, or it belongs to another diffusion.framework."""
    for name in dict.fromkeys(change.partition("=")[0] for change in changes):
        if not is_used(config, name):
            used_by = f"diffusion.framework={framework_of(name)}"
            raise ConfigError(
                f"--config.{name} is {get(config, name)!r}, but diffusion.framework is "
                f"{config.diffusion.framework}; expected it only with {used_by}; type "
                f"--config.{used_by}, or leave out --config.{name}"
            )
        if config.phases and all(name in phase[1] for phase in config.phases):
            value = get(config, name)
            typed_in_all = phases.with_changes(config, range(len(config.phases)), {name: value})
            raise ConfigError(
                f"--config.{name} is {value!r}, but each of phases sets {name} itself; expected a "
                "field that the phases leave alone; type "
                f"--config.phases={quoted(typed_in_all)} instead of it"
            )


def _from_file(path):
    given = path
    path, has_argument, argument = _split(path)
    files.local_path(path, "--config")  # refuses what is no path
    file = _found(path)
    if file.suffix != ".py" or not file.is_file():
        names = ", ".join(pathlib.Path(each).stem for each in shipped())
        raise ConfigError(
            f"--config is {given!r}, which is {_kind(file)}; expected a Python file, or a file in "
            f"configs/ by its name ({names}); type "
            f"--config={_nearest_file(file)}{given.removeprefix(path)}"
        )
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    try:
        fault = "it has no function get_config()"
        with _configs_importable(file):
            spec.loader.exec_module(module)
            if hasattr(module, "get_config"):
                chosen = _argument(path, module, argument if has_argument else None)
                config = module.get_config(*chosen)
                fault = config_fault(config)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        fault = described_error(error, file)
    if fault:
        raise ConfigError(
            f"--config={path}: {fault}; expected a function get_config() that sets fields of "
            "default_config() of maskdm_jax.config, and returns it; correct the file, or type "
            f"--config={_EXAMPLE}"
        )
    return config.lock()


def _found(path):
    """The file of this path; if there is none, the one in configs/ of this path or name."""
    file = pathlib.Path(path).expanduser()
    for each in shipped():
        if not file.is_file() and path in (each, pathlib.Path(each).stem):
            return _SHIPPED / each
    return file


@contextlib.contextmanager
def _configs_importable(file) -> Iterator[None]:
    """Inside, `from configs import NAME` finds the shipped NAME.py.

    If `file` lies in another folder of that name, its neighbours come first.
    """

    def loaded():
        return {
            name: each for name, each in sys.modules.items() if f"{name}.".startswith("configs.")
        }

    package = types.ModuleType("configs")
    own = [str(file.parent)] if file.absolute().parent.name == "configs" else []
    package.__path__ = [*own, str(_SHIPPED / "configs")]
    before = loaded()
    for name in before:
        del sys.modules[name]
    sys.modules["configs"] = package
    try:
        yield
    finally:
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)


def _split(path):
    """FILE, whether ":" follows it, and the argument after that; FILE may be a shipped name."""
    file, colon, argument = path.rpartition(":")
    known = file.endswith(".py") or file in (pathlib.Path(each).stem for each in shipped())
    return (file, True, argument) if colon and known else (path, False, "")


def _argument(path, module, typed_one):
    """What to call a file's get_config with: (), or its argument of that name (None: the first)."""
    names = getattr(module, "ARGUMENTS", ())
    if typed_one is None:
        return names[:1]
    if not names:
        raise ConfigError(
            f"--config={path}:{typed_one} has an argument, but the file takes none (it has no "
            f"ARGUMENTS); type --config={path}"
        )
    if typed_one not in names:
        near = nearest_word(typed_one, names) or names[0]
        raise ConfigError(
            f"--config={path}:{typed_one} has the argument {typed_one!r}; expected one of "
            f"{', '.join(names)}; type --config={path}:{near}"
        )
    return (typed_one,)


def _kind(file):
    if file.is_dir():
        return "a folder"
    return "not a Python file" if file.exists() else "not there"


def _nearest_file(file):
    here = [
        *sorted(file.parent.glob("[a-z]*.py")),
        *sorted(pathlib.Path("configs").glob("[a-z]*.py")),
    ]
    files = [*here, *map(pathlib.Path, shipped())]
    near = nearest_word(file.stem, [each.stem for each in files])
    return next((each for each in files if each.stem == near), _EXAMPLE)


def config_fault(config):
    """What is wrong with the result of get_config(); None if nothing."""
    if not isinstance(config, config_dict.ConfigDict):
        what = "None" if config is None else f"a {type(config).__name__}"
        return f"get_config() returns {what}"
    names = {
        f"{group}.{leaf}" if leaf else group
        for group, value in config.items()
        for leaf in (value if isinstance(value, config_dict.ConfigDict) else ("",))
    }
    if missing := sorted(FIELDS.keys() - names):
        return f"the config of get_config() lacks {missing[0]}"
    if unknown := sorted(names - FIELDS.keys()):
        return f"the config of get_config() has {unknown[0]}, which is not a field"
    return None


def described_error(error, file):
    """An error of the user's file in words, with the line."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    where = f"line {lines[-1]}: " if lines else ""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if text.startswith(("'", '"')):  # ml-collections quotes its texts, once or twice
        text = text.replace("\\n", ". ").replace("\\", "").strip("\"'")
    return f"{where}{type(error).__name__}: {' '.join(text.split())}"
