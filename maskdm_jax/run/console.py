"""What a person sees while a run trains: a bar on a terminal, a line for each record elsewhere.

The loss shown is smoothed over the updates, see `progress.Smoothed`; metrics.jsonl has each
record's own.
"""

import time
from collections.abc import Callable
from typing import Any

from maskdm_jax.run import progress

# The time left is shown once so many updates were timed; fewer, but at least 3, if they took long.
_FEW_UPDATES, _LONG_S = 10, 10.0


class Console:
    """Shows the updates of one run."""

    def __init__(self, num_steps: int, work: Callable[[int], Any]):
        """
        Args:
          num_steps: updates of the whole run.
          work: step -> FLOPs, among others, of the run's updates up to it, see `flops.work`.
        """
        self._num_steps, self._work = num_steps, work
        self._bar = progress.bar("training", num_steps, "steps")
        self._loss = progress.Smoothed()
        self._record = {}  # the newest
        self._has_forecast = False
        self.start_clock()

    def start_clock(self) -> None:
        """Starts the time from which the time left follows, as after a compilation."""
        self._start = None  # (step, when): the end of the first update, which is slow

    def progress(self, step: int, loss: float) -> None:
        """Shows that `step` is completed, and once how long the run will take."""
        self._loss.add(loss)
        if self._start is None:
            self._start = (step, time.perf_counter())
        left = self._seconds_left(step)
        if left is not None and not self._has_forecast:
            self._has_forecast = True
            if left > _LONG_S:
                self._forecast(step, left)
        if self._bar is not None:
            self._bar.at(step, self._notes(left))

    def show(self, record: dict) -> None:
        """Shows a record of metrics.jsonl."""
        self._record = record
        if self._bar is not None:
            return
        parts = [
            f"step {record['step']}/{self._num_steps}",
            self._described_loss(),
            f"lr {record['lr']:.2e}",
            f"grad {record['grad_norm']:.3f}",
            f"{record['images_per_s']:,.0f} images/s",
            f"{record['model_tflops']:.3g} TFLOP/s",
        ]
        if record.get("skipped"):
            parts.append(f"skipped {record['skipped']}")
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        left = self._seconds_left(record["step"])
        if left is not None:
            parts.append(f"left {progress.clock(left)}")
        progress.say("  ".join(parts))

    def close(self) -> None:
        """Ends the line of the bar."""
        if self._bar is not None:
            self._bar.close()

    def _notes(self, left):
        notes, record = [self._described_loss()], self._record
        if left:
            notes.insert(0, f"{progress.clock(left)} left")
        if record.get("skipped"):
            notes.append(f"skipped {record['skipped']}")
        if record:
            notes.append(f"{record['images_per_s']:,.0f} images/s")
        if "mfu" in record:
            notes.append(f"MFU {record['mfu']:.1%}")
        if record:
            notes += [f"lr {record['lr']:.2e}", f"grad {record['grad_norm']:.3f}"]
        return notes

    def _described_loss(self):
        return f"loss {self._loss.mean:.4f}"

    def _seconds_left(self, step):
        """To the end of the run; None if too few updates were timed."""
        begun, since = self._start or (step, 0.0)
        steps, seconds = step - begun, time.perf_counter() - since
        if steps < 3 or (steps < _FEW_UPDATES and seconds < _LONG_S):
            return None
        return (self._work(self._num_steps).flops - self._work(step).flops) / self._speed(step)

    def _speed(self, step):
        """FLOP/s since the clock started; the steps of a later phase may take longer."""
        begun, since = self._start
        done = self._work(step).flops - self._work(begun).flops
        return done / (time.perf_counter() - since)

    def _forecast(self, step, left):
        progress.say(
            f"about {progress.clock(left)} to the end at {self._speed(step) / 1e12:.3g} TFLOP/s, "
            "plus saves, previews and scores"
        )
