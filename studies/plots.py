"""The plots of a study's page; their points come best score first."""

import math

import numpy as np

from maskdm_jax.heldout import NAMES as BINS
from studies.points import BASELINE, by_arm

# Label and unit of each cost.
_COSTS = {
    "seconds": ("device-seconds", 1),
    "images": ("images seen, M", 1e6),
    "pflop": ("PFLOP", 1),
}
_MARKS = "os^Dv"  # the next one when the colours are used up
_COLOURS = 10


def plot_arms(found: list, floor: float, score: str, seconds: float):
    """The score of every arm at one budget, best at the top; one colour per family."""
    shown = [point for point in found if point.seconds == seconds][::-1]  # found: best first
    figure, (axis,) = _subplots(1, width=8, height=1.2 + 0.24 * len(shown))  # with long names
    families = list(dict.fromkeys(point.family for point in found))
    for place, point in enumerate(shown):
        number = families.index(point.family)
        axis.plot(point.scores, [place] * len(point.scores), "o", color=f"C{number}")
    axis.set_yticks(range(len(shown)), [point.arm for point in shown])
    axis.set(xscale=_scale(shown), xlabel=score, title=f"{seconds:g} device-seconds")
    if math.isfinite(floor):
        axis.axvline(floor, color="grey", linestyle=":")
    _plain_ticks(axis.xaxis)
    axis.grid(alpha=0.3, which="both")
    return figure


def plot_scores(found: list, floor: float, score: str):
    """Score against each cost; one line per arm, dashed for scratch."""
    figure, axes = _subplots(len(_COSTS))
    arms = by_arm(found)
    for axis, (cost, (label, unit)) in zip(axes, _COSTS.items(), strict=True):
        for number, (arm, of_arm) in enumerate(arms.items()):
            of_arm = sorted(of_arm, key=lambda point: point.seconds)
            costs = [getattr(point, cost) / unit for point in of_arm]
            scores = [point.score for point in of_arm]
            spread = [
                [point.score - min(point.scores) for point in of_arm],
                [max(point.scores) - point.score for point in of_arm],
            ]
            line = "--" if of_arm[0].family == BASELINE else "-"
            mark = _MARKS[number // _COLOURS % len(_MARKS)]
            style = {"fmt": f"{mark}{line}", "color": f"C{number % _COLOURS}", "markersize": 4}
            axis.errorbar(costs, scores, spread, label=arm, **style)
        axis.set(xscale="log", yscale=_scale(found), xlabel=label)
        if math.isfinite(floor):
            axis.axhline(floor, color="grey", linestyle=":", label="floor")
        _plain_ticks(axis.yaxis)
        _plain_ticks(axis.xaxis)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(score)
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_seconds(found: list):
    """The least seconds of each family until scratch's score, against scratch's own seconds.

    None for one budget of scratch, of which there is no line.
    """
    if len({r.scratch.seconds for r in found}) < 2:
        return None
    figure, (axis,) = _subplots(1)
    ends = [f(r.scratch.seconds for r in found) for f in (min, max)]
    for share, line, label in ((1, "--", "no gain"), (0.5, ":", "half the seconds")):
        axis.plot(ends, [share * end for end in ends], line, color="grey", label=label)
    families = {}
    for r in sorted(found, key=lambda r: r.seconds):
        families.setdefault(r.family, {}).setdefault(r.scratch.seconds, r)
    for number, (family, by_budget) in enumerate(families.items()):
        least = [by_budget[budget] for budget in sorted(by_budget)]
        bounds = [r for r in least if r.is_bound]
        for shown, style, size, label in (
            (least, "o-", 6, family),
            (bounds, "v", 11, None if number or not bounds else "at most"),
        ):
            x, y = [r.scratch.seconds for r in shown], [r.seconds for r in shown]
            axis.plot(x, y, style, markersize=size, color=f"C{number}", label=label)
    axis.set(
        xlabel="device-seconds of the best scratch run",
        ylabel="device-seconds until its score",
        xlim=(0, None),
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def plot_bins(best: list):
    """Held-out loss by noise level over that of the best scratch run, at one budget."""
    baseline = next((point for point in best if point.family == BASELINE), None)
    if len(best) == 1 or baseline is None or not np.isfinite(baseline.bins).all():
        return None
    figure, (axis,) = _subplots(1)
    for point in best:
        axis.plot(range(len(BINS)), np.divide(point.bins, baseline.bins), "o-", label=point.arm)
    _bin_ticks(axis)
    axis.set_ylabel("held-out loss / scratch's")
    axis.set_title(f"{baseline.seconds:g} s; scratch: {baseline.arm}", fontsize="small")
    axis.legend()
    return figure


def plot_factors(levels: dict):
    """Scratch's seconds over those until its held-out loss, by noise level; a line for each run.

    Args:
      levels: of `points.reached_by_level`.
    """
    if not levels:
        return None
    figure, (axis,) = _subplots(1, height=4.4 + 0.4 * len(levels))  # with the legend below
    bounded = False
    for number, ((arm, seconds), of_line) in enumerate(sorted(levels.items())):
        factors = [r.factor if r else math.nan for r in of_line]
        scratch = next(r.scratch.arm for r in of_line if r)
        label = f"{arm}\nto {scratch}, {seconds:g} s"
        axis.plot(factors, "o-", color=f"C{number}", label=label)
        bounds = [(i, r.factor) for i, r in enumerate(of_line) if r and r.is_bound]
        if bounds:
            label = None if bounded else "at least"
            axis.plot(
                *zip(*bounds, strict=True), "^", markersize=11, color=f"C{number}", label=label
            )
            bounded = True
    axis.axhline(1, color="grey", linestyle="--")
    _bin_ticks(axis)
    axis.set(ylabel="factor in seconds until scratch's held-out loss", ylim=(0, None))
    figure.legend(fontsize="small", loc="outside lower center")
    return figure


def _bin_ticks(axis):
    axis.set_xticks(range(len(BINS)), BINS, rotation=45, ha="right")
    axis.set_xlabel("ln(signal² / noise²)")
    axis.grid(alpha=0.3)


def _subplots(count, width=5.2, height=4.2):
    from matplotlib.figure import Figure  # pyplot would keep every figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, sharey=True)[0]


def _scale(found):
    """That of their scores: KID may be 0 or less, and precision is 0 at first."""
    is_positive = all(score > 0 for p in found for score in p.scores if math.isfinite(score))
    return "log" if is_positive else "linear"


def _plain_ticks(axis):
    """0.3 instead of 3 x 10^-1, at round numbers; after plotting, since the range counts."""
    from matplotlib import ticker

    if axis.get_scale() == "linear":
        return
    low, high = axis.get_data_interval()
    if math.isclose(low, high):  # one point; error bars round it
        getattr(axis.axes, f"set_{axis.axis_name}lim")(low / 1.5, high * 1.5)
    low, high = axis.get_view_interval()
    digits = (1, 3)
    if high < 100 * low:
        digits = (1, 2, 5)
    if high < 10 * low:
        digits = (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(ticker.LogLocator(subs=digits))
    if high < 4 * low:  # two or three of them at most
        axis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
        axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
