"""What each run is: a row for each, and the fields in which they differ."""

from xml.etree import ElementTree

from maskdm_jax import flops, phases
from maskdm_jax.config import default_config, differences, resolved
from maskdm_jax.model.sizes import dimensions
from maskdm_jax.report import plots, runs
from maskdm_jax.report.markup import element, table


def section(found: list[runs.Run]) -> list:
    """A table of runs, then their configs side by side."""
    head = ["run", "stage", "data", "network", "tokens per image", "steps"]
    rows = [[named(run, found), *_described(run, found)] for run in found]
    parts = [table(head, rows)]
    found = [run for run in found if run.config]
    if not found:
        return parts
    changed = [set(differences(run.config, default_config())) for run in found]
    first = found[0].config
    differ = {name for run in found for name in differences(run.config, first)}
    if len(found) > 1:
        parts += [element("h3", "Where the configs differ"), _side_by_side(found, differ)]
    shared = set().union(*changed) - differ
    what = "Other fields that are not at their defaults" if differ else "Fields not at defaults"
    parts.append(
        element(
            "details",
            element("summary", f"{what} ({len(shared)})"),
            _side_by_side(found[:1], shared, "value"),
        )
    )
    return parts


def named(run: runs.Run, found: list[runs.Run]) -> ElementTree.Element:
    """A run's name, behind a square of its colour in all curves."""
    style = f"background:{plots.colour(found.index(run))}"
    return element(
        "span", element("span", class_="swatch", style=style), " ", run.name, class_="run"
    )


def _described(run, found):
    config = run.config
    if config is None:
        files = dict.fromkeys(each.settings.get("init_path", "") for each in run.samples)
        of = ", ".join(path for path in files if path)
        return [f"none here: samples or scores alone{of and f', of {of}'}", *["-"] * 4]
    width, depth, heads = dimensions(config.model)
    size = "x".join(map(str, config.data.image_size))
    parts = [phase.config for phase in phases.phases(config)]
    patches = dict.fromkeys(str(part.model.patch_size) for part in parts)
    classes = f", {config.model.num_classes} classes" if config.model.num_classes else ""
    return [
        _stage(run, found),
        f"{config.data.name}, {size}{classes}",
        f"U-ViT, width {width}, {2 * (depth // 2) + 1} blocks, {heads} heads, patches of "
        f"{', then '.join(patches)}",
        ", then ".join(map(flops.tokens_text, parts)),
        f"{runs.steps(run):,} of {config.train.num_steps:,}",
    ]


def _stage(run, found):
    start = run.config.init.path
    kinds = [phase.config.mask.kind for phase in phases.phases(run.config)]
    what = ", then ".join(
        "training on whole images" if kind == "none" else f"masked training ({kind})"
        for kind in kinds
    )
    if not start:
        return f"{what}, from fresh weights"
    earlier = runs.before(run, found)
    return f"{what}, from the weights of {earlier[-1].name if earlier else start}"


def _side_by_side(found, names, only=None):
    rows = [
        [element("code", name), *[str(resolved(run.config, name)) for run in found]]
        for name in sorted(names)
    ]
    if not rows:
        return element("p", "None.")
    return table(["field", *([only] if only else [run.name for run in found])], rows)
