"""Progress for a person to follow: a bar with the time left on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

_LINE_EVERY_S = 10.0
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


def track(items: Iterable, total: int, what: str, unit: str) -> Iterator:
    """Yields `items`, `total` in number, and shows the progress."""
    if sys.stderr.isatty() and not _muted:
        yield from tqdm(items, total=total, desc=what, unit=f" {unit}")
        return
    start = last = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if done and now - last > _LINE_EVERY_S:
            last = now
            left = clock((now - start) / done * (total - done))
            remark(f"{what}: {done}/{total} {unit}, {left} left")
        yield item
    remark(f"{what}: {total} {unit} in {time.perf_counter() - start:.1f} s")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def bar(total: int, initial: int, unit: str) -> tqdm | None:
    """A bar on a terminal, None elsewhere."""
    if _muted or not sys.stderr.isatty():
        return None
    return tqdm(total=total, initial=initial, unit=f" {unit}")
