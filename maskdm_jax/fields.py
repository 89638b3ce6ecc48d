"""The types of the config table: a field's kind (the values it takes) and its role."""

import difflib
import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple


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
    """

    expected: str
    accepts: Callable[[Any], bool]
    nearest: Callable[[Any, Any], Any]


class Field(NamedTuple):
    """A row of the table in `config`."""

    default: Any
    kind: Kind
    role: Role
    meaning: str


def number(low: float | None = None, high: float | None = None) -> Kind:
    """A finite number between inclusive bounds; None means unbounded."""
    if low is None:
        expected = "a finite number"
    else:
        expected = f"at least {low}" if high is None else f"between {low} and {high}"

    def nearest(value, default):
        if not _is_number(value) or low is None:
            return default
        return low if value < low else high

    def accepts(value):
        if not _is_number(value):
            return False
        return (low is None or low <= value) and (high is None or value <= high)

    return Kind(expected, accepts, nearest)


def whole(low: int, high: int | None = None) -> Kind:
    """A whole number between inclusive bounds; None is no bound."""
    kind = number(low, high)

    def nearest(value, default):
        return round(value) if kind.accepts(value) else kind.nearest(value, default)

    def accepts(value):
        return isinstance(value, int) and kind.accepts(value)

    return Kind(f"a whole number, {kind.expected}", accepts, nearest)


def one_of(*words: str) -> Kind:
    """One of `words`."""

    def nearest(value, default):
        by_lower_case = {word.lower(): word for word in words}
        near = difflib.get_close_matches(str(value).lower(), by_lower_case, 1)
        return by_lower_case[near[0]] if near else default

    return Kind(f"one of {', '.join(words)}", lambda value: value in words, nearest)


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_size(value):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(isinstance(side, int) and side > 0 for side in value)


SEED = whole(0, 2**31 - 1)
COUNT = whole(1)
COUNT_OR_0 = whole(0)
NUMBER = number()
NON_NEGATIVE = number(0)
TEXT = Kind("text", lambda value: isinstance(value, str), lambda value, default: default)
FLAG = Kind("True or False", lambda value: isinstance(value, bool), lambda value, default: default)
SIZE = Kind("two positive numbers, (height, width)", _is_size, lambda value, default: default)
NAMES = Kind(
    "names, such as \"('position',)\"",
    lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
    lambda value, default: default,
)
