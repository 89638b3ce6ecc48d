"""Samples of the runs, and how their previews changed over training."""

from maskdm_jax.report import commands, cost, runs, scores
from maskdm_jax.report.markup import element, image

_MAX_SAMPLES, _MAX_PREVIEWS = 4, 8


def samples(found: list[runs.Run], configs: dict) -> list:
    """The newest samples of each run, beside those of the others."""
    figures, remarks = [], []
    for run in found:
        for drawn in run.samples[-_MAX_SAMPLES:]:
            figures.append(_figure(run, drawn, found))
        if older := run.samples[:-_MAX_SAMPLES]:
            remarks.append(element("p", f"{run.name}: {len(older)} older sets are left out."))
        if not run.samples:
            remarks.append(_none(run, "samples", commands.mode(run, configs, "sample")))
    return [element("div", figures, class_="grid") if figures else [], remarks]


def _figure(run, drawn, found):
    s = drawn.settings
    shown = "up to 64 of " if drawn.count > 64 else ""
    text = f"{shown}{drawn.count:,} samples"
    if "sampler" in s:
        text += (
            f", {s['sampler']} with {s['steps']} steps, guidance {s['guidance_scale']:g}, "
            f"{s['weights']} weights, seed {s['seed']}"
        )
    if s.get("init_image"):
        text += f", from {s['init_image']}" + (" around a mask" if s["init_mask"] else "")
    picture = runs.picture(drawn.folder / "grid.png")
    caption = element(
        "figcaption",
        element("b", f"{run.name}, step {s['step']:,}"),
        f": {text}. {cost.sentence(run, found)} ",
        scores.of_samples(drawn, run, found),
    )
    return element("figure", image(*picture, f"Samples of {run.name}"), caption)


def previews(found: list[runs.Run], configs: dict) -> list:
    """Some previews of each run, evenly spaced over training, first and last included."""
    parts = []
    for run in found:
        if not run.config:
            continue
        if not run.previews:
            what = "previews, which are drawn during training"
            parts.append(_none(run, what, commands.with_previews(run, configs)))
            continue
        last = len(run.previews) - 1
        count = min(len(run.previews), _MAX_PREVIEWS)
        chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
        figures = [
            element(
                "figure",
                image(*runs.picture(path), f"Preview of {run.name} at step {step}"),
                element("figcaption", f"step {step:,}"),
            )
            for step, path in (run.previews[i] for i in chosen)
        ]
        head = f"{run.name}: {len(chosen)} of {len(run.previews)}"
        parts += [element("h3", head), element("div", figures, class_="strip", tabindex="0")]
    return parts


def _none(run, what, command):
    if run.is_masked:
        return element("p", f"{run.name} has no {what}: {commands.MASKED}", class_="missing")
    return commands.missing(f"{run.name} has no {what}", command)
