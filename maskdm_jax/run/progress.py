"""Progress for a person to follow: a bar with the time left on a terminal, lines elsewhere."""

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

_LINE_EVERY_S = 10.0
_BAR_EVERY_S = 0.1
_MIN_BAR = 8  # columns; the notes that leave less to the bar are left out
_MAX_NAME = 32  # columns
_COLUMNS = 80  # of a terminal that does not tell its size
_ROWS = 24  # tqdm shows nothing in a terminal of 0 rows
_muted = False


def mute() -> None:
    """Silences this process; only process 0 prints."""
    global _muted
    _muted = True


def say(text: str) -> None:
    """Prints a line at once, without breaking a bar."""
    if _muted:
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def remark(text: str) -> None:
    """Prints a line of progress to standard error, where bars are too."""
    if _muted:
        return
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Bar:
    """A bar on a terminal, one line whatever the terminal's width."""

    def __init__(self, what: str, total: int, unit: str):
        """
        Args:
          what: the work, in a word or two.
          total: how much of it there is.
          unit: what `total` counts.
        """
        self._what = what if len(what) <= _MAX_NAME else f"...{what[3 - _MAX_NAME :]}"
        self._total, self._unit = total, unit
        self._tqdm = None
        self._drawn = 0.0  # when

    def at(self, done: int, notes: Sequence[str] = (), begun: float = 0.0) -> None:
        """Shows how far the work is.

        Args:
          done: of the total.
          notes: what else to show if there is room, what matters most first.
          begun: how much of the rest is done in parts.
        """
        now = time.perf_counter()
        if now - self._drawn < _BAR_EVERY_S and done < self._total:
            return
        self._drawn = now
        columns, length = _columns(), min(done + begun, self._total)
        percent = 100 * length / max(self._total, 1)
        head = f"{self._what} {percent:3.0f}%|"
        text = layout(head, f"| {done:,}/{self._total:,} {self._unit}", notes, columns)
        if self._tqdm is None:
            self._tqdm = tqdm(
                total=self._total,
                initial=length,
                bar_format=text,
                ncols=columns,
                nrows=_ROWS,
                file=sys.stderr,
                leave=None,  # one inside another is erased at its end
            )
            return
        self._tqdm.n, self._tqdm.bar_format, self._tqdm.ncols = length, text, columns
        self._tqdm.refresh()

    def close(self) -> None:
        """Leaves the bar where it is, and ends its line."""
        if self._tqdm is not None:
            self._tqdm.close()


def bar(what: str, total: int, unit: str) -> Bar | None:
    """A bar on a terminal, None elsewhere."""
    return None if _muted or not sys.stderr.isatty() else Bar(what, total, unit)


def layout(head: str, tail: str, notes: Sequence[str], columns: int) -> str:
    """A bar's line for tqdm, with "{bar}" for the bar itself.

    Args:
      head, tail: what stands before and behind the bar.
      notes: what may follow if it leaves room for a bar, what matters most first.
      columns: of the line.
    """
    for note in notes:
        if len(head) + _MIN_BAR + len(tail) + 2 + len(note) <= columns:
            tail += f"  {note}"
    braces = str.maketrans({"{": "{{", "}": "}}"})
    return head.translate(braces) + "{bar}" + tail.translate(braces)


class Progress:
    """How far a piece of work is, and its time left: a bar, or a line every ten seconds.

    A context manager. The time left follows from the time since the first call of `at`.
    """

    def __init__(self, what: str, total: int, unit: str):
        """Args: as for `Bar`."""
        self._what, self._total, self._unit = what, total, unit
        self._bar = bar(what, total, unit)
        self._start = self._line = time.perf_counter()
        self._first = None  # (done, when), by the first call of `at`

    def __enter__(self):
        return self

    def at(self, done: int, note: str = "", begun: float = 0.0) -> None:
        """Shows how far the work is.

        Args:
          done: of the total.
          note: more on it.
          begun: how much of the rest is done in parts.
        """
        now = time.perf_counter()
        worked = done + begun
        self._first = self._first or (worked, now)
        notes = [note] if note else []
        if worked > self._first[0] and done < self._total:
            each = (now - self._first[1]) / (worked - self._first[0])
            notes.insert(0, f"{clock(each * (self._total - worked))} left")
        if self._bar is not None:
            self._bar.at(done, notes, begun)
        elif now - self._line > _LINE_EVERY_S:
            self._line = now
            parts = [f"{self._what}: {done}/{self._total} {self._unit}", *reversed(notes)]
            remark(", ".join(parts))

    def __exit__(self, error, *_):
        if self._bar is not None:
            self._bar.close()
        elif error is None:
            seconds = time.perf_counter() - self._start
            remark(f"{self._what}: {self._total} {self._unit} in {seconds:.1f} s")


def track(items: Iterable, total: int, what: str, unit: str) -> Iterator:
    """Yields `items`, `total` in number, and shows the progress."""
    with Progress(what, total, unit) as shown:
        for done, item in enumerate(items):
            shown.at(done)
            yield item
        shown.at(total)


class Smoothed:
    """The mean of a series with weights that fall by `decay` for each later value."""

    def __init__(self, decay: float = 0.98):
        self._decay = decay
        self._sum = self._weight = 0.0

    def add(self, value: float) -> None:
        """Adds the next value; one that is not finite is left out."""
        if math.isfinite(value):
            self._sum += (1 - self._decay) * (value - self._sum)
            self._weight += (1 - self._decay) * (1 - self._weight)

    @property
    def mean(self) -> float:
        """The weighted mean; nan without a value."""
        return self._sum / self._weight if self._weight else math.nan


def _columns():
    """Columns that a line may fill without a wrap; some terminals wrap a full line."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return (columns or _COLUMNS) - 1
