"""The metrics of a run: console (bar or lines), metrics.jsonl, TensorBoard; and its scores.

Only process 0 writes. A resumed run drops records beyond its checkpoint; each step appears once.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from maskdm_jax.run import distributed, faults, files, lock, progress

_JSONL, _SCORES, _SCORES_LOCK = "metrics.jsonl", "scores.jsonl", ".scores.lock"
TRAINING = "training, step "  # how the keys of scores start that training itself computes


class Telemetry:
    """Writes the metrics of one run."""

    def __init__(
        self,
        workdir: str | pathlib.Path,
        config,
        first_step: int,
        work: Callable[[int], Any],
        peak_tflops: float | None,
    ):
        """
        Args:
          workdir: where metrics.jsonl and tensorboard/ go.
          config: the run's.
          first_step: completed updates at the start; later records are dropped.
          work: step -> images, tokens and flops of the run's updates up to it, see `flops.work`.
          peak_tflops: dense peak of all devices together; None if unknown.
        """
        workdir = pathlib.Path(workdir)
        self._workdir = workdir
        self._config = config
        self._work = work
        self._peak_tflops = peak_tflops
        self._device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        self._file = self._board = self._bar = None
        self.start_clock(first_step)
        kept = [r for r in read_metrics(workdir) if r["step"] <= first_step]
        self.skipped = kept[-1].get("skipped", 0) if kept else 0  # steps, up to `first_step`
        if not distributed.is_main():
            return
        with self._full_disk_explained():
            self._open(workdir / _JSONL, kept, first_step)
            _drop_scores(workdir, first_step)
        self._bar = progress.bar(config.train.num_steps, first_step, "steps")

    def start_clock(self, step: int) -> None:
        """Starts the time from which rates and the time left follow, as after a compilation."""
        self._start = self._last = (step, time.perf_counter())

    def restart_clock(self, step: int) -> None:
        """Excludes the time since the last record from the rates (a save, a sample grid)."""
        self._last = (step, time.perf_counter())

    def progress(self, step: int) -> None:
        """Moves the bar, if there is one."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

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
            line = (_to_json(record) + "\n").encode()
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            values = {k: v for k, v in record.items() if k not in ("step", "device")}
            self._write_event(step=step, summary=_summary(values))
        self._show(record)

    def close(self) -> None:
        """Closes the bar and the files, which already have every record."""
        for target in (self._file, self._board, self._bar):
            if target is not None:
                target.close()

    def _open(self, path, kept, first_step):
        files.write_text(path, "".join(_to_json(r) + "\n" for r in kept))
        self._file = path.open("ab", buffering=0)
        # Not SummaryWriter: a full disk kills its thread, and its queue then blocks the run.
        folder = path.parent / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._board = EventsWriter(str(folder / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write_event(step=first_step + 1, session_log=start)  # drops what came later

    def _write_event(self, **fields):
        self._board.write_event(event_pb2.Event(wall_time=time.time(), **fields))
        self._board.flush()

    def _full_disk_explained(self):
        remedy = "make room, then the same command resumes from the newest checkpoint"
        return faults.explain_full_disk("the metrics", self._workdir, remedy)

    def _show(self, record):
        parts = [
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"grad {record['grad_norm']:.3f}",
            f"{record['images_per_s']:,.0f} images/s",
            f"{record['model_tflops']:.3g} TFLOP/s",
        ]
        if record.get("skipped"):
            parts.append(f"skipped {record['skipped']}")
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            return
        total = self._config.train.num_steps
        # By FLOPs: the steps of a later phase may take longer.
        begun, done, whole = (self._work(n).flops for n in (self._start[0], record["step"], total))
        left = (time.perf_counter() - self._start[1]) / max(done - begun, 1) * (whole - done)
        progress.say(f"step {record['step']}/{total}  {text}  left {progress.clock(left)}")


def read_metrics(workdir: str | pathlib.Path) -> list[dict]:
    """The records of a run's metrics.jsonl, with nan for null; damaged lines are left out."""
    path = pathlib.Path(workdir) / _JSONL
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            record = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            record["step"] + record["loss"]  # a record has both
            records.append(record)
    return records


def _to_json(record):
    """One line of JSON, which has no nan and no infinity."""
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary(values):
    return summary_pb2.Summary(
        value=[summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
    )


def read_scores(workdir: str | pathlib.Path) -> list[dict]:
    """The records of scores.jsonl; damaged lines are left out."""
    path = pathlib.Path(workdir) / _SCORES
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            record["step"], record["key"], record["scores"], record["definition"]  # it has these
            records.append(record)
    return records


def _drop_scores(workdir, last_step):
    """Drops what training itself scored beyond `last_step`."""
    records = read_scores(workdir)
    kept = [r for r in records if not (r["key"].startswith(TRAINING) and r["step"] > last_step)]
    if len(kept) < len(records):
        with lock.hold(workdir, _SCORES_LOCK):
            files.write_text(workdir / _SCORES, "".join(_to_json(r) + "\n" for r in kept))


def add_scores(workdir: str | pathlib.Path, record: dict) -> None:
    """Adds a record to scores.jsonl, shows it, and plots its numbers in TensorBoard.

    Args:
      workdir: the run.
      record: as `evaluation` makes it, with "key"; it replaces an earlier one with the same key.
    """
    workdir = pathlib.Path(workdir)
    with lock.hold(workdir, _SCORES_LOCK):  # an evaluation may run beside the training
        kept = [r for r in read_scores(workdir) if r["key"] != record["key"]]
        files.write_text(workdir / _SCORES, "".join(_to_json(r) + "\n" for r in (*kept, record)))
    losses = {f"heldout_loss_{k}": loss["mean"] for k, loss in record["heldout_loss"].items()}
    summary = _summary({f"scores/{k}": v for k, v in (record["scores"] | losses).items()})
    folder = workdir / "tensorboard" / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    # One file for each record: the writer names files by the second.
    suffix = "." + hashlib.sha256(record["key"].encode()).hexdigest()[:16]
    board = EventsWriter(str(folder / "events"), suffix)
    board.write_event(event_pb2.Event(wall_time=time.time(), step=record["step"], summary=summary))
    board.close()
    progress.say(described_scores(record))


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
