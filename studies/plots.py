"""The plots of a study's page. Their points are those of `studies.page`, best score first."""

import math

import numpy as np

from maskdm_jax.heldout import NAMES as BINS

BASELINE = "scratch"  # the family that the others are compared with
_COSTS = {"seconds": "device-seconds", "images": "images seen", "pflop": "PFLOP"}


def plot_arms(found: list, floor: float, score: str, seconds: float):
    """The score of every arm at one budget, best at the top; one colour per family."""
    shown = [point for point in found if point.seconds == seconds][::-1]  # found: best first
    figure, (axis,) = _subplots(1, height=1.2 + 0.24 * len(shown))
    families = list(dict.fromkeys(point.family for point in found))
    for place, point in enumerate(shown):
        number = families.index(point.family)
        axis.plot(point.scores, [place] * len(point.scores), "o", color=f"C{number}")
    axis.set_yticks(range(len(shown)), [point.arm for point in shown])
    axis.set(xscale="log", xlabel=score, title=f"{seconds:g} device-seconds")
    _plain_ticks(axis.xaxis)
    if math.isfinite(floor):
        axis.axvline(floor, color="grey", linestyle=":")
    axis.grid(alpha=0.3, which="both")
    return figure


def plot_scores(found: list, floor: float, score: str):
    """Score against each cost; one line per arm, one colour per family."""
    figure, axes = _subplots(len(_COSTS))
    families = list(dict.fromkeys(point.family for point in found))
    for axis, (cost, label) in zip(axes, _COSTS.items(), strict=True):
        for number, family in enumerate(families):
            arms = {}
            for point in found:
                if point.family == family:
                    arms.setdefault(point.arm, []).append(point)
            for index, of_arm in enumerate(arms.values()):
                of_arm = sorted(of_arm, key=lambda point: point.seconds)
                costs = [getattr(point, cost) for point in of_arm]
                scores = [point.score for point in of_arm]
                spread = [
                    [point.score - min(point.scores) for point in of_arm],
                    [max(point.scores) - point.score for point in of_arm],
                ]
                axis.errorbar(
                    costs, scores, spread, fmt="o-", markersize=4, color=f"C{number}",
                    alpha=0.8, label=None if index else family,
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel=label)
        _plain_ticks(axis.yaxis)
        if cost != "images":
            _plain_ticks(axis.xaxis)
        if math.isfinite(floor):
            axis.axhline(floor, color="grey", linestyle=":", label="floor")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(score)
    axes[0].legend()
    return figure


def plot_bins(best: list):
    """Held-out loss by noise level over that of the best scratch run, at one budget."""
    baseline = next((point for point in best if point.family == BASELINE), None)
    if baseline is None:
        return None
    figure, (axis,) = _subplots(1)
    for point in best:
        axis.plot(range(len(BINS)), np.divide(point.bins, baseline.bins), "o-", label=point.arm)
    axis.set_xticks(range(len(BINS)), BINS, rotation=45, ha="right")
    axis.set(xlabel="ln(signal² / noise²)", ylabel=f"held-out loss / that of {baseline.arm}")
    axis.set_title(f"{baseline.seconds:g} s")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def _subplots(count, height=4.2):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, count, figsize=(5.2 * count, height), layout="constrained", squeeze=False, sharey=True
    )
    return figure, axes[0]


def _plain_ticks(axis):
    """0.3 instead of 3 x 10^-1, at the round numbers of a logarithmic axis."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
