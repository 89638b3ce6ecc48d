"""What the runs have cost: time, images, FLOPs, device-hours."""

import math

import numpy as np

from maskdm_jax.report import runs
from maskdm_jax.report.markup import element, table
from maskdm_jax.report.summary import named


def section(found: list[runs.Run]) -> list:
    """A row for each run, and one for it with the runs that its weights come from."""
    head = [
        "run", "training time", "images", "model FLOPs", "device-hours", "devices",
        "images/s (median)", "MFU (median)",
    ]  # fmt: skip
    rows = []
    for run in found:
        if not run.config:
            continue
        rates = [_median(run, key) for key in ("images_per_s", "mfu")]
        speed = [_number(rates[0], "{:,.0f}"), _number(rates[1], "{:.1%}")]
        devices = runs.devices(run) or "not recorded"
        rows.append([named(run, found), *_row(runs.cost(run)), devices, *speed])
        if earlier := runs.before(run, found):
            label = f"{run.name} with {' and '.join(r.name for r in earlier)}"
            rows.append([label, *_row(_whole(run, found)), "", "", ""])
    text = (
        "Training time is steps x seconds per step: no start-up, compilation, saves, previews or "
        "scores. Device-hours are this time x the number of devices. FLOPs are the model's: 2 per "
        "multiply-add, a backward pass counted as two forward passes (docs/speed.md)."
    )
    return [table(head, rows), element("p", text, class_="soft")] if rows else []


def sentence(run: runs.Run, found: list[runs.Run]) -> str:
    """A run's training time in words, with that of the runs before it; "" if it is none."""
    if not run.config:
        return ""
    whole, earlier = _whole(run, found), runs.before(run, found)
    own = _time(runs.cost(run).seconds)
    if not earlier:
        return f"Trained for {own}."
    names = " and ".join(r.name for r in earlier)
    return f"Trained for {_time(whole.seconds)}: {own} of its own, the rest in {names}."


def _whole(run, found):
    return sum(map(runs.cost, runs.before(run, found)), runs.cost(run))


def _row(spent):
    hours = spent.device_seconds / 3600
    return [
        _time(spent.seconds),
        _number(spent.images, "{:,.0f}"),
        _number(spent.flops, "{:.3g}"),
        _number(hours, "{:,.3g}"),
    ]


def _median(run, key):
    values = [record[key] for record in run.metrics if key in record]
    return float(np.median(values)) if values else math.nan


def _number(value, form):
    return form.format(value) if math.isfinite(value) else "unknown"


def _time(seconds):
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:,.0f} min" if seconds < 36000 else f"{seconds / 3600:,.1f} h"
