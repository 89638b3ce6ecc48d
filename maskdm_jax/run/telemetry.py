"""The metrics of a run: console, metrics.jsonl, TensorBoard, W&B; and its previews and scores.

Only process 0 writes. A resumed run drops records beyond its checkpoint; each step appears once.
"""

import contextlib
import errno
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from maskdm_jax.run import (
    console,
    distributed,
    faults,
    files,
    lock,
    progress,
    tensorboard,
    wandb_mirror,
)

_JSONL, _SCORES, _SCORES_LOCK = "metrics.jsonl", "scores.jsonl", ".scores.lock"
TRAINING = "training, step "  # how the keys of scores start that training itself computes


class Telemetry:
    """Writes the metrics of one run.

    Attributes:
      previews: the folder of the grids of samples, named step_N.png.
      skipped: steps up to `first_step` that were not applied.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        config,
        first_step: int,
        work: Callable[[int], Any],
        peak_tflops: float | None,
        mirror: wandb_mirror.Mirror | None = None,
    ):
        """
        Args:
          workdir: where metrics.jsonl and tensorboard/ go.
          config: the run's.
          first_step: completed updates at the start; later records are dropped.
          work: step -> images, tokens and flops of the run's updates up to it, see `flops.work`.
          peak_tflops: dense peak of all devices together; None if unknown.
          mirror: the run's in W&B, which gets what it lacks up to `first_step`; None for none.
        """
        workdir = files.as_place(workdir)
        self._workdir = workdir
        self.previews = workdir / "previews"
        self._config = config
        self._work = work
        self._peak_tflops = peak_tflops
        self._device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        self._mirror = mirror
        self._file = self._growing = self._board = None
        self._console = console.Console(config.train.num_steps, work)
        self.start_clock(first_step)
        kept = [r for r in read_metrics(workdir) if r["step"] <= first_step]
        self.skipped = kept[-1].get("skipped", 0) if kept else 0
        if not distributed.is_main():
            return
        with self._full_disk_explained():
            self._open(kept, first_step)
            _drop_scores(workdir, first_step)
        if mirror is not None:
            self._catch_up(kept, first_step)

    def start_clock(self, step: int) -> None:
        """Starts the time from which rates and the time left follow, as after a compilation."""
        self._last = (step, time.perf_counter())
        self._console.start_clock()

    def restart_clock(self, step: int) -> None:
        """Excludes the time since the last record from the rates (a save, a sample grid)."""
        self._last = (step, time.perf_counter())

    def progress(self, step: int, loss: float) -> None:
        """Shows that `step` is completed, with its loss; for every update, before `log`."""
        self._console.progress(step, loss)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of the update that completed `step`, with the rates since the last
        record."""
        if self._file is None:
            return
        now = time.perf_counter()
        since, seconds = min(self._last[0], step - 1), now - self._last[1]
        self._last = (step, now)
        before, done = self._work(since), self._work(step)
        tflops = (done.flops - before.flops) / seconds / 1e12
        record = {
            "step": step,
            **metrics,
            "images": done.images,
            "tokens": done.tokens,
            "model_flops": done.flops,
            "step_s": seconds / (step - since),
            "images_per_s": (done.images - before.images) / seconds,
            "model_tflops": tflops,
            "device": self._device,
        }
        if self._peak_tflops is not None:
            record["mfu"] = tflops / self._peak_tflops
        with self._full_disk_explained():
            line = (to_json(record) + "\n").encode()
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._growing.sync()
            self._board.scalars(step, _numbers(record))
        if self._mirror is not None:
            self._mirror.scalars(step, _numbers(record))
        self._console.show(record)

    def preview(self, step: int, path: pathlib.Path) -> None:
        """Shows the grid of samples that was written to `path`; on process 0 alone."""
        with self._full_disk_explained():
            self._board.preview(step, path)
        if self._mirror is not None:
            self._mirror.preview(step, path)

    def scores(self, record: dict) -> None:
        """As `add_scores`, for what training itself scored; on process 0 alone."""
        add_scores(self._workdir, record)
        if self._mirror is not None:
            self._mirror.scores(*plotted(record))

    def flush(self) -> None:
        """Makes a bucket have every record; otherwise it gets them about once a minute.

        Call it before a checkpoint is saved, from which a run resumes without making them again.
        """
        if self._file is not None:
            self._growing.sync(now=True)
            self._board.flush()

    def close(self) -> None:
        """Closes the bar and the files, which then have every record."""
        for target in (self._file, self._growing, self._board, self._console, self._mirror):
            if target is not None:
                target.close()

    def _open(self, kept, first_step):
        self._growing = files.growing(self._workdir)
        path = self._growing.local / _JSONL
        files.write_text(path, "".join(to_json(r) + "\n" for r in kept))
        self._growing.sync(now=True)
        self._file = path.open("ab", buffering=0)
        self._board = tensorboard.Board(self._workdir, self._config.to_dict(), first_step)

    def _catch_up(self, kept, last_step):
        """Hands W&B all that the run has written up to `last_step`, step by step."""
        send = functools.partial
        rows = [(r["step"], send(self._mirror.scalars, r["step"], _numbers(r))) for r in kept]
        for path in self.previews.glob("step_*.png"):
            if (number := path.stem.removeprefix("step_")).isdecimal():
                rows.append((int(number), send(self._mirror.preview, int(number), path)))
        for record in read_scores(self._workdir):
            if record["key"].startswith(TRAINING):
                rows.append((record["step"], send(self._mirror.scores, *plotted(record))))
        for step, send_row in sorted(rows, key=lambda row: row[0]):
            if step <= last_step:
                send_row()

    def _full_disk_explained(self):
        remedy = "make room, then the same command resumes from the newest checkpoint"
        return faults.explain_full_disk("the metrics", self._workdir, remedy)


def read_metrics(workdir: str | pathlib.Path) -> list[dict]:
    """The records of a run's metrics.jsonl, with nan for null; damaged lines are left out."""
    path = files.as_place(workdir) / _JSONL
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            record = _with_nan(json.loads(line))
            record["step"] + record["loss"]  # a record has both
            records.append(record)
    return records


def to_json(record: dict) -> str:
    """One line of JSON, which has no nan and no infinity: null in their place."""
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value):
    """What `_finite` was given, but with nan where an infinity was."""
    if isinstance(value, dict):
        return {k: _with_nan(v) for k, v in value.items()}
    return math.nan if value is None else value


def _numbers(record):
    return {k: v for k, v in record.items() if k not in ("step", "device")}


def read_scores(workdir: str | pathlib.Path) -> list[dict]:
    """The records of scores.jsonl, with nan for a null score; damaged lines are left out."""
    path = files.as_place(workdir) / _SCORES
    records = []
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            record["step"], record["key"], record["definition"]  # it has these, and scores
            measured = {k: record.get(k) for k in ("scores", "heldout_loss", "floor")}
            record |= {k: _with_nan(v) for k, v in measured.items() if v or k == "scores"}
            records.append(record)
    return records


def _drop_scores(workdir, last_step):
    """Drops what training itself scored beyond `last_step`."""
    if not (workdir / _SCORES).exists():
        return
    with lock.hold(workdir, _SCORES_LOCK):  # an evaluation may run beside the training
        files.remove_leftovers(workdir, _SCORES)
        records = read_scores(workdir)
        beyond = [r for r in records if r["key"].startswith(TRAINING) and r["step"] > last_step]
        if beyond:
            kept = [r for r in records if r not in beyond]
            files.write_text(workdir / _SCORES, "".join(to_json(r) + "\n" for r in kept))
    for record in beyond:
        tensorboard.drop_scores(workdir, record["key"])


def add_scores(workdir: str | pathlib.Path, record: dict) -> None:
    """Adds a record to scores.jsonl, shows it, and plots its numbers in TensorBoard.

    Args:
      workdir: the run.
      record: as `evaluation` makes it, with "key"; it replaces an earlier one with the same key.
    """
    workdir = files.as_place(workdir)
    with lock.hold(workdir, _SCORES_LOCK):  # an evaluation may run beside the training
        kept = [r for r in read_scores(workdir) if r["key"] != record["key"]]
        files.write_text(workdir / _SCORES, "".join(to_json(r) + "\n" for r in (*kept, record)))
    tensorboard.write_scores(workdir, record["key"], *plotted(record))
    progress.say(described_scores(record))


def plotted(record: dict) -> tuple[int, dict[str, float], str]:
    """What is plotted of a record of scores: its step, {name: score}, and the definition."""
    losses = {f"heldout_loss_{k}": loss["mean"] for k, loss in record["heldout_loss"].items()}
    return (
        record["step"],
        {f"scores/{name}": score for name, score in (record["scores"] | losses).items()},
        described_definition(record["definition"]),
    )


def described_scores(record: dict) -> str:
    """A record's scores in one line, never without their definition."""
    parts = [f"{name} {value:.4g}" for name, value in record["scores"].items()]
    for name, loss in record["heldout_loss"].items():
        parts.append(f"held-out loss ({name}) {loss['mean']:.5f}")
    if floor := described_floor(record):
        parts.append(floor)
    if "evaluations" in record:
        parts.append(f"{record['evaluations']} evaluations an image")
    said = described_definition(record["definition"])
    return f"step {record['step']}: {'; '.join(parts)} ({said})"


def described_floor(record: dict) -> str:
    """The scores of held-out images beside those of as many samples; empty without them."""
    floor = record.get("floor")
    if not floor:
        return ""
    pairs = zip(floor["heldout"].items(), floor["samples"].values(), strict=True)
    return "; ".join(
        f"at n {floor['n']}: {k} {ours:.4g}, floor {held:.4g}" for (k, held), ours in pairs
    )


def described_definition(d: dict) -> str:
    """The entries of a definition that readers ask for first, in one line."""
    std = f" of std {d['ema_std']:g}" if d.get("ema_std") else ""
    later = ("recompute_eps", "threshold", "guidance_interval")
    more = "".join(f", {name} {d[name]}" for name in later if name in d)
    return (
        f"n {d['n']:,}; {d['weights']}{std}, {d['sampler']} {d['steps']} {d['spacing']}, eta "
        f"{d['eta']:g}, guidance {d['guidance_scale']:g}{more}; "
        f"reference {d['reference_sha256'][:8]}; network {d.get('network_sha256', 'none')[:8]}"
    )
