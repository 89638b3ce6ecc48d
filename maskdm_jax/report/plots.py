"""Curves as inline SVG: transparent, in the text's colour, so they suit light and dark pages."""

import io
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np

from maskdm_jax.errors import ConfigError

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise ConfigError(
        "the report needs matplotlib; type: pip install 'maskdm_jax[demo]'"
    ) from error

# Each has a contrast of at least 3 with white and with nearly black. They repeat after six runs.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a63d2", "#a6761d")
_INK = "#010203"  # stands for the colour of the page's text
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_MAX_POINTS = 1000


def colour(index: int) -> str:
    """The colour of run `index` of a page."""
    return COLOURS[index % len(COLOURS)]


def loss(
    curves: Sequence[tuple[str, np.ndarray, np.ndarray]], xlabel: str, label: str
) -> ElementTree.Element:
    """Loss curves: smoothed, with the recorded values behind.

    Args:
      curves: (colour, x [N], loss [N]) each.
      xlabel: of the axis, with the unit.
      label: what the picture shows, for those who do not see it.
    """
    axis = _axis(xlabel, "loss")
    for shade, x, y in curves:
        every = -(-len(x) // _MAX_POINTS)
        axis.plot(x[::every], y[::every], color=shade, alpha=0.25, linewidth=0.8)
        axis.plot(x[::every], smoothed(y)[::every], color=shade, linewidth=1.8)
    large = axis.get_xlim()[1] >= 1e6
    axis.xaxis.set_major_formatter(EngFormatter() if large else "{x:,g}")  # 8 T; 20,000
    return _svg(axis.figure, label)


def by_noise_level(
    curves: Sequence[tuple[str, str, Sequence[float]]], names: Sequence[str], label: str
) -> ElementTree.Element:
    """Held-out losses by noise level.

    Args:
      curves: (colour, line style, loss of each bin, nan for none) each.
      names: of the bins.
      label: as for `loss`.
    """
    axis = _axis("ln SNR", "held-out loss")
    for shade, style, values in curves:
        axis.plot(range(len(names)), values, style, color=shade, marker="o", markersize=3)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    return _svg(axis.figure, label)


def smoothed(y: np.ndarray) -> np.ndarray:
    """A centred mean over a tenth of the values, weighted by a Hann window; it skips nan."""
    window = np.hanning(2 * (len(y) // 20) + 3)[1:-1]
    known = np.isfinite(y)
    total = np.convolve(np.where(known, y, 0), window, "same")
    weight = np.convolve(known, window, "same")
    return np.divide(total, weight, out=np.full(len(y), np.nan), where=weight > 0)


def _axis(xlabel, ylabel):
    with matplotlib.rc_context(_STYLE):
        axis = Figure(figsize=(5, 3.2), layout="constrained").add_subplot()
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")  # 0.2, not 2 x 10^-1
        axis.yaxis.set_minor_formatter(NullFormatter())
    return axis


def _svg(figure, label):
    out = io.StringIO()
    # The salt keeps the names inside this picture apart from those of the page's others.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": label}):
        figure.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    text = out.getvalue().replace(_INK, "currentColor")
    used = set(re.findall(r"#([\w-]+)", text))
    root = ElementTree.fromstring(text)
    for element in root.iter():
        # Inside HTML, SVG needs no namespaces.
        element.tag = element.tag.rpartition("}")[2]
        kept = {k.rpartition("}")[2]: v for k, v in element.attrib.items()}
        if kept.get("id") not in used:
            kept.pop("id", None)
        element.attrib.clear()
        element.attrib.update(kept)
    del root.attrib["width"], root.attrib["height"]  # the page sets its size
    root.attrib.update({"role": "img", "aria-label": label})
    return root
