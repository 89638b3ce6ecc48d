"""The loss over training, and the held-out loss by noise level."""

import math

from maskdm_jax.report import commands, plots, runs
from maskdm_jax.report.markup import element
from maskdm_jax.report.summary import named


def losses(found: list[runs.Run], configs: dict) -> list:
    """The loss by step, images, seconds and FLOPs."""
    trained = [run for run in found if run.metrics]
    parts = [
        commands.missing(f"{run.name} has not trained yet", commands.train(run, configs))
        for run in found
        if run.config and not run.metrics
    ]
    if not trained:
        return parts
    totals = {run: runs.progress(run) for run in trained}
    offsets = {run: sum(map(runs.cost, runs.before(run, trained)), runs.Cost()) for run in trained}
    panels = []
    for key, xlabel in _AXES.items():
        lines = []
        for run in trained:
            x = getattr(totals[run], key) + getattr(offsets[run], key, 0)
            lines.append((plots.colour(found.index(run)), x, totals[run].loss))
        names = ", ".join(run.name for run in trained)
        panels.append(plots.loss(lines, xlabel, f"Training loss of {names} by {xlabel}"))
    follow = [run.name for run in trained if runs.before(run, trained)]
    text = (
        "Pale: as recorded. Strong: a centred mean over a tenth of the records. A loss is the mean "
        "over the patches that the network sees, so only runs with the same mask are comparable."
    )
    if follow:
        text += (
            f" The curve of {', '.join(follow)} starts where the run it began from ends; by step "
            "it starts at 0."
        )
    grid = element("div", [element("figure", panel) for panel in panels], class_="grid")
    return [*parts, _legend(trained, found), element("p", text, class_="soft"), grid]


_AXES = {
    "step": "step",
    "images": "images",
    "seconds": "training seconds",
    "flops": "model FLOPs",
}


def heldout(found: list[runs.Run], configs: dict) -> list:
    """The newest held-out loss of each run; only losses on the same problems share a picture."""
    problems, parts = {}, []
    for run in found:
        record = max(
            (r for r in run.scores if r["heldout_loss"]), key=lambda r: r["step"], default=None
        )
        if record is None:
            parts.append(_no_heldout(run, configs))
            continue
        for weights, loss in record["heldout_loss"].items():
            split = record["definition"].get("heldout_sha256", "")
            problem = (
                split,
                loss["n"],
                loss.get("schedule", "unknown"),
                loss.get("num_timesteps", 0),
            )
            line = (run, record["step"], weights, loss["bins"])
            problems.setdefault((*problem, tuple(loss["bins"])), []).append(line)
    for (split, count, schedule, timesteps, names), lines in problems.items():
        drawn, said = [], []
        for run, step, weights, bins in lines:
            values = [math.nan if bins[name] is None else bins[name] for name in names]
            style = "-" if weights == "ema" else ":"
            drawn.append((plots.colour(found.index(run)), style, values))
            said.append(f"{run.name}, step {step}, {weights} weights")
        levels = f"{schedule} noise schedule" + (f" of {timesteps} timesteps" if timesteps else "")
        what = f"{count:,} held-out images ({split[:8]}), {levels}: {'; '.join(said)}"
        picture = plots.by_noise_level(drawn, names, f"Held-out loss by noise level: {what}")
        caption = element("figcaption", f"{what}. Solid: ema; dotted: raw weights.")
        shown = [run for run in found if run in [line[0] for line in lines]]
        figure = element("figure", picture, caption)
        parts += [_legend(shown, found), element("div", figure, class_="grid")]
    return parts


def _no_heldout(run, configs):
    if run.is_masked:
        return element("p", f"{run.name}: {commands.MASKED}", class_="missing")
    if run.scores and not (run.config and run.config.eval.heldout_split):
        return commands.missing(f"{run.name} was scored without held-out images", None)
    if run.scores:
        problem = (
            f"{run.name} was scored without held-out images; prepare its data with a test split "
            "(docs/data.md), then score it"
        )
    else:
        problem = f"{run.name} has no held-out loss"
    return commands.missing(problem, commands.mode(run, configs, "evaluate"))


def _legend(shown, found):
    return element("ul", [element("li", named(run, found)) for run in shown], class_="legend")
