"""The types of the config table: a field's kind (the values it takes) and its role.

The flags of the programs have kinds too, so a wrong value of either is answered in the same words.
"""

import ast
import contextlib
import difflib
import enum
import re
import shlex
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from maskdm_jax.errors import ConfigError


class Role(enum.Enum):
    """What follows if a field differs from that of a stored run."""

    SHAPE = enum.auto()  # the parameters have other shapes: refused
    MEANING = enum.auto()  # the same parameters would mean something else: refused
    UPDATE = enum.auto()  # the updates differ: reported when a run resumes
    FREE = enum.auto()  # no update differs: a resumed run may change it silently


SHAPE, MEANING, UPDATE, FREE = Role


class Kind(NamedTuple):
    """Which values a field takes.

    Fields:
      expected: the accepted values, in words.
      accepts: value -> whether it is accepted.
      nearest: (wrong value, the field's default) -> a value to suggest.
      read: typed text -> a value, which need not be an accepted one.
    """

    expected: str
    accepts: Callable[[Any], bool]
    nearest: Callable[[Any, Any], Any]
    read: Callable[[str], Any] = str


class Field(NamedTuple):
    """A row of the table in `config`."""

    default: Any
    kind: Kind
    role: Role
    meaning: str


def typed(flag: str, text: str, kind: Kind, default: Any) -> Any:
    """The value of a flag from the text that was typed for it.

    Args:
      flag: as typed, such as "--config.mask.ratio"; the name of an argument that has none.
      text: what follows the "=".
      kind: which values the flag takes.
      default: the value to suggest if none is near.

    Raises:
      ConfigError: for a value that `kind` does not accept.
    """
    value = kind.read(text)
    if not kind.accepts(value):
        near = quoted(kind.nearest(value, default))
        remedy = f"{flag}={near}" if flag.startswith("-") else near
        raise ConfigError(f"{flag} is {value!r}; expected {kind.expected}; type {remedy}")
    return value


def quoted(value: Any) -> str:
    """A value as it is typed in a shell."""
    return f'"{tuple(value)}"' if isinstance(value, (tuple, list)) else shlex.quote(str(value))


def nearest_word(word: str, words) -> str | None:
    """The one of `words` that was probably meant; None if none is near. Case does not count."""
    by_lower_case = {each.lower(): each for each in words}
    near = difflib.get_close_matches(word.lower(), by_lower_case, 1)
    return by_lower_case[near[0]] if near else None


def as_tuples(value: Any) -> Any:
    """`value` with tuples for lists, at any depth."""
    if isinstance(value, dict):
        return {key: as_tuples(each) for key, each in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, (list, tuple)) else value


def number(low: float | None = None, high: float | None = None) -> Kind:
    """A finite number between inclusive bounds; None means unbounded."""
    expected = f"a finite number{_bounds(low, high)}"

    def nearest(value, default):
        if not _is_number(value) or low is None:
            return low if default is None else default
        return low if value < low else high

    def accepts(value):
        if not _is_number(value):
            return False
        return (low is None or low <= value) and (high is None or value <= high)

    def read(text):
        value = _literal(text)
        return float(value) if type(value) is int else value

    return Kind(expected, accepts, nearest, read)


def whole(low: int, high: int | None = None) -> Kind:
    """A whole number between inclusive bounds; None is no bound."""
    kind = number(low, high)

    def nearest(value, default):
        return round(value) if kind.accepts(value) else kind.nearest(value, default)

    def accepts(value):
        return isinstance(value, int) and kind.accepts(value)

    return Kind(f"a whole number{_bounds(low, high)}", accepts, nearest, _literal)


def one_of(*words: str) -> Kind:
    """One of `words`."""

    def nearest(value, default):
        return nearest_word(str(value), words) or default or words[0]

    return Kind(f"one of {', '.join(words)}", lambda value: value in words, nearest)


def choice(*values: int) -> Kind:
    """One of these whole numbers."""

    def nearest(value, default):
        return min(values, key=lambda v: abs(v - value)) if _is_number(value) else default

    def accepts(value):
        return type(value) is int and value in values

    return Kind(f"one of {', '.join(map(str, values))}", accepts, nearest, _literal)


def some_of(*words: str) -> Kind:
    """Some of `words`, without order."""

    def nearest(value, default):
        given = value if isinstance(value, tuple) else (value,)
        return tuple(near for word in given if (near := nearest_word(str(word), words))) or default

    def accepts(value):
        return isinstance(value, tuple) and value != () and set(value) <= set(words)

    def read(text):
        value = _literal(text)
        return tuple(value.split(",")) if isinstance(value, str) else value

    return Kind(f"some of {', '.join(words)}", accepts, nearest, read)


def _literal(text):
    """The Python value that was typed; the text itself if it is none."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    with contextlib.suppress(ValueError, OverflowError):
        if re.fullmatch(r"[+-]?(inf|nan)", text.lower()):
            return float(text)
    with warnings.catch_warnings():  # about the \. of regular expressions
        warnings.simplefilter("ignore")
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
            return tuple(value) if isinstance(value, list) else value
    return text


def _are_phases(value):
    return isinstance(value, tuple) and all(_is_phase(each) and each[0] > 0 for each in value)


def _is_phase(value):
    if not isinstance(value, tuple) or len(value) != 2 or not _is_number(value[0]):
        return False
    return isinstance(value[1], dict) and all(isinstance(name, str) for name in value[1])


def _nearest_phases(value, default):
    value = as_tuples(value)
    value = (value,) if _is_phase(value) else value  # one phase, without its last comma
    if not isinstance(value, tuple) or not all(map(_is_phase, value)):
        return default
    return tuple((share if share > 0 else 1.0, changes) for share, changes in value)


def _bounds(low, high):
    if low is None:
        return ""
    return f", at least {low}" if high is None else f" between {low} and {high}"


def _is_number(value):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < float("inf")  # false for nan; math.isfinite fails on 10**400


def _is_size(value):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(type(side) is int and side > 0 for side in value)


def _nearest_size(value, default):
    sides = [int(side) for side in re.findall(r"(?<![\d.])[1-9]\d*", str(value))]
    return (sides[0], (sides * 2)[1]) if sides else default


def _is_interval(value):
    if not isinstance(value, tuple) or len(value) != 2 or not all(map(_is_number, value)):
        return False
    return 0 <= value[0] <= value[1] <= 1


def _nearest_interval(value, default):
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(_is_number, value)):
        return default
    return tuple(sorted(min(max(float(end), 0.0), 1.0) for end in value))


def _nearest_flag(value, default):
    words = {"": True, "yes": True, "on": True, "1": True, "no": False, "off": False, "0": False}
    return words.get(str(value).lower(), default)


def _are_patterns(value):
    if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
        return False
    with contextlib.suppress(re.error):
        return all(re.compile(name) for name in value)
    return False


def _are_coarse(value):
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and type(pair[0]) is int
        and pair[0] > 1
        and _is_number(pair[1])
        and pair[1] > 0
        for pair in value
    )


def _nearest_coarse(value, default):
    value = as_tuples(value)
    value = (value,) if _are_coarse((value,)) else value  # one pair, without its last comma
    return value if _are_coarse(value) else default


def _read_patterns(text):
    value = _literal(text)
    return (value,) if isinstance(value, str) and value else value


SEED = whole(0, 2**31 - 1)
COUNT = whole(1)
COUNT_OR_0 = whole(0)
NUMBER = number()
NON_NEGATIVE = number(0)
TEXT = Kind("text", lambda value: isinstance(value, str), lambda value, default: default)
PROJECT = Kind(
    "1 to 128 characters, none of them of /\\#?%:",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[^/\\#?%:]{1,128}", value)),
    lambda value, default: re.sub(r"[/\\#?%:]", "-", str(value))[:128] or default,
)
FLAG = Kind("True or False", lambda value: isinstance(value, bool), _nearest_flag, _literal)
SIZE = Kind("two whole numbers, (height, width)", _is_size, _nearest_size, _literal)
INTERVAL = Kind("two shares, 0 <= first <= last <= 1", _is_interval, _nearest_interval, _literal)
PHASES = Kind(
    "pairs of a share above 0 and the fields that change, such as "
    "\"((3, {'mask.kind': 'block'}), (1, {}))\"",
    _are_phases,
    _nearest_phases,
    lambda text: as_tuples(_literal(text)),
)
COARSE = Kind(
    "pairs of a whole number above 1 and a number above 0, such as ((2, 1.0), (4, 2.5))",
    _are_coarse,
    _nearest_coarse,
    lambda text: as_tuples(_literal(text)),
)
_NUMBERS = r"(\d+|-)(,(\d+|-))*"
BLOCKS = Kind(
    'two lists of block numbers, such as "in_block=0,0,1 out_block=0,1,-" (- is a fresh block)',
    lambda value: (
        isinstance(value, str)
        and bool(re.fullmatch(f"(in_block={_NUMBERS} out_block={_NUMBERS})?", value))
    ),
    lambda value, default: default,
)
NAMES = Kind(
    "regular expressions over names, such as \"('position', 'patch_embed/.*')\"",
    _are_patterns,
    lambda value, default: default,
    _read_patterns,
)
