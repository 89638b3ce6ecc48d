"""Who may import whom: the rooms of the package import downwards only."""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "maskdm_jax"
# Any room may import these, and they import at most what stands here.
GROUND = {
    "errors": set(),
    "fields": {"errors"},
    "rng": set(),
    "sharding": set(),
    "model.sizes": set(),
    "run.progress": set(),
    "run.bucket": {"errors"},
    "run.files": {"errors", "run.bucket"},
}
# room or module -> what it may import besides itself and the ground.
ALLOWED = {
    "config": {"field_table"},
    "field_table": set(),
    "config_file": {"config", "phases"},
    "phases": {"config", "denoiser", "flops"},
    "diffusion": set(),
    "model": set(),
    "data": {"phases", "run.command_line", "run.faults", "run.lock"},
    "run": set(),
    "weights": {
        "averages", "checkpoint", "config", "diffusion.ddpm", "phases", "run.command_line",
        "run.distributed", "run.faults", "run.hashes",
    },
    "quality": {
        "data.archives", "data.folders", "data.image_set", "data.pixels", "data.read_ahead",
        "data.sources", "data.tfds", "run", "weights.torch_file",
    },
    "checkpoint": {"config", "run"},
    "optim": set(),
    "provenance": {"config"},
    "images": set(),
    "flops": {"model"},
    "state": {"model", "optim"},
    "denoiser": {"config", "diffusion", "model"},
    "step": {"denoiser", "model", "diffusion", "optim", "phases", "state", "data.batch"},
    "transition": {"optim", "phases", "state", "weights"},
    "draw": {"denoiser", "flops", "model", "diffusion"},
    "draw_batches": {"draw", "model", "diffusion"},
    "report": {"config", "config_file", "flops", "phases", "quality", "run"},
    "sample": {"config", "data.pixels", "draw", "draw_batches", "images", "run", "weights"},
    "dry_run": {"phases", "step", "run"},
    "averages": {"checkpoint", "optim", "phases", "run"},
    "heldout": {"data.read_ahead", "denoiser", "diffusion", "draw", "model"},
    "score_sets": {"config", "data", "quality", "run"},
    "evaluation": {
        "config", "data", "draw", "draw_batches", "heldout", "quality", "run", "score_sets",
    },
    "compare": {"quality", "run"},
    "__main__": {"main", "run"},  # and the programs, each when it is typed
    "main": {
        "checkpoint", "config", "config_file", "evaluate", "field_table", "phases", "run", "sample",
        "train",
    },
    "evaluate": {
        "averages", "checkpoint", "config", "draw", "draw_batches", "evaluation", "images",
        "phases", "quality", "run", "sample", "weights",
    },
    "arguments": {"config"},
    "trained": {
        "arguments", "averages", "checkpoint", "config", "draw", "phases", "run",
        "weights.torch_io",
    },
    "api_sampling": {"arguments", "config", "draw", "draw_batches"},
    "api": {
        "api_sampling", "arguments", "config", "denoiser", "diffusion", "draw", "evaluation",
        "model", "quality", "trained",
    },
    "start_summary": {"flops", "phases", "run"},
    "train": {
        "averages", "checkpoint", "config", "data", "diffusion", "draw", "dry_run", "evaluation",
        "flops", "images", "phases", "provenance", "run", "start_summary", "state", "step",
        "transition", "weights",
    },
}  # fmt: skip


def imports(path):
    """Names of our modules, such as "model.patches", that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("maskdm_jax.") for name in names if name.startswith("maskdm_jax.")}
    return {name for name in ours if resolve(name)} | {
        name.rpartition(".")[0] for name in ours if not resolve(name)
    }


def resolve(name):
    path = PACKAGE / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def within(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_downwards_only(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    room = name.partition(".")[0]
    if name in GROUND:
        allowed = GROUND[name]
    elif room == "diffusion":
        allowed = {room}
    else:
        allowed = {room, *ALLOWED[room], *GROUND}
    for imported in imports(path) - {""}:
        assert within(imported, allowed), f"{name} imports {imported}"


def test_every_room_and_module_has_a_rule():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    ground = {name.partition(".")[0] for name in GROUND}
    assert rooms == ground | set(ALLOWED)


def test_no_module_or_function_is_too_long():
    for path in FILES:
        text = path.read_text()
        if "hopper" not in path.name:
            assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 130 if (path.stem, node.name) == ("train", "train") else 80
                if "hopper" not in path.name:
                    assert node.end_lineno - node.lineno < limit, f"{path}: {node.name}"
