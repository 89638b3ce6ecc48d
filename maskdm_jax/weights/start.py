"""Starts from other weights: stage 2 from stage 1's workdir, or from an official `.pt` file.

Each parameter is restored, resized by a rule, left out or fresh (`rules`). Whatever no rule covers
is an error, unless `config.init.reinit` or `config.init.ignore` names it. So are weights that are
not finite, and weights that fit but mean something else: they were trained with another value of a
field of the role MEANING, such as the prediction, and `config.init.allow` does not list that field.
A `.pt` file holds its number of heads only through its size.
"""

import re
from collections.abc import Callable

import jax
import numpy as np

from maskdm_jax import averages, checkpoint, phases
from maskdm_jax.config import (
    FIELDS,
    as_flags,
    block_map,
    described,
    differences,
    get,
    resolved,
)
from maskdm_jax.errors import ConfigError, OtherRecipe
from maskdm_jax.fields import MEANING, SHAPE, nearest_word, quoted
from maskdm_jax.run import faults, files
from maskdm_jax.weights import resize, rules, torch_io

_BLOCK = re.compile(r"(in|out)_block_(\d+)/")


def load_params(config, make_fresh: Callable) -> tuple[dict, rules.Table]:
    """Parameters from `config.init`.

    Args:
      config: the run's. Its `init` has path (a workdir, or an official .pt file), weights ("raw" or
        "ema"), reinit and ignore (regular expressions, each matched against whole names such as
        "mid_block/qkv/kernel"), map (see `config.block_map`) and allow (fields that may differ).
      make_fresh: () -> fresh parameters, which give the expected shapes; computed only if some are
        needed.

    Returns:
      (float32 parameters with the structure of `make_fresh`'s, what became of each).

    Raises:
      ConfigError: naming the weights that no rule covers, or the fields that give them another
        meaning; also if they are not finite, or the path holds no weights.
    """
    init = config.init
    loaded, stored, source = _read(config)
    expected = jax.eval_shape(make_fresh)
    ours, theirs = rules.by_name(expected), rules.by_name(loaded)
    old, new = resize.geometry(stored), resize.geometry(config)
    _check_names(init.reinit, ours)
    _check_map(init.map, theirs, source)

    def stays_fresh(name):
        if _matches(init.reinit, name):
            return "init.reinit"
        return "init.ignore" if _matches(init.ignore, name) else ""

    rows, problems = rules.plan(
        theirs,
        ours,
        old,
        new,
        block_map(init.map),
        stays_fresh,
        lambda name: _matches(init.ignore, name),
    )
    if _is_unmapped(init.map, ours, theirs):
        # Names in common are no reason: out_block_0 takes the skip of another in-block there.
        others = [row.name for row in rows if row.name not in problems]
        problems |= {name: name for name in others if _BLOCK.match(name)}
    if problems:
        raise ConfigError(_misfit(config, stored, source, problems, ours, theirs))
    _check_meaning(config, stored, source)
    carried = [row.source for row in rows if row.outcome in ("restored", "resized")]
    used = {name: theirs[name] for name in carried}
    if used:
        other = "--config.init.path=PATH of another one"
        faults.check_finite(used, f"init.path {source}", other)
    needs_fresh = any(row.outcome == "fresh" or "fresh" in row.why for row in rows)
    fresh = rules.by_name(make_fresh()) if needs_fresh else {}
    made = rules.carried(rows, theirs, fresh, old, new)
    leaves = [np.asarray(made[name], np.float32) for name in ours]
    params = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    return params, rules.Table(source, rows)


def check_unused(config) -> None:
    """Raises ConfigError if a field says how to start from other weights, and none are given."""
    for name in ("map", "reinit", "ignore", "allow"):
        field = f"init.{name}"
        if (value := get(config, field)) != (none := FIELDS[field].default):
            raise ConfigError(
                f"{field} is {value!r}, but init.path is empty; expected weights to start from; "
                f"type --config.init.path=PATH, or --config.{field}={quoted(none)}"
            )


def _read(config):
    """(parameters, the config that they were trained with, a phrase for their source)."""
    init = config.init
    path = files.place(init.path, "init.path")
    expected = (
        "expected another run's workdir, or an official .pt file with tensors only; type "
        "--config.init.path=PATH"
    )
    if not path.exists():
        raise ConfigError(f"init.path {init.path} does not exist; {expected}")
    if path.is_file():
        files.local_path(path, "init.path")  # refuses a file in a bucket
        try:
            official = torch_io.load_official(str(path), init.weights)
            stored = torch_io.config_of(official, config)
        except ValueError as error:
            raise ConfigError(f"init.path: {error}; {expected}") from error
        return official.params, stored, f"{path} ({init.weights})"
    # The folder of all checkpoints, or of one, instead of the workdir.
    runs = [parent for parent in files.parents(path)[:2] if checkpoint.steps(parent)]
    step = checkpoint.find_step(
        path, instead=f"--config.init.path={runs[0] if runs else 'PATH of such a workdir'}"
    )
    item = {"raw": "params", "ema": "ema"}[init.weights]
    params = checkpoint.restore_item(path, step, item)
    stored = phases.at(checkpoint.load_config(path, step), step).config
    if init.weights == "ema":
        params = averages.kept(params, stored)
    return params, stored, f"{path} ({init.weights}, step {step})"


def _check_names(patterns, ours):
    for pattern in patterns:
        if any(re.fullmatch(pattern, name) for name in ours):
            continue
        near = nearest_word(pattern, ours) or "patch_embed/.*"
        fixed = tuple(near if each == pattern else each for each in patterns)
        raise ConfigError(
            f"init.reinit is {patterns!r}, but {pattern!r} matches no parameter of this model; "
            f"expected expressions over names such as mid_block/qkv/kernel; type "
            f"--config.init.reinit={quoted(fixed)}"
        )


def _check_map(text, theirs, source):
    named = [block for block in block_map(text).values() if block != "-"]
    for block in named:
        if not any(name.startswith(f"{block}/") for name in theirs):
            num_there, num_here = _num_skips(theirs), len(block_map(text)) // 2
            last = f"in_block_{num_there - 1} and out_block_{num_there - 1}"
            raise ConfigError(
                f"init.map is {text!r}, but {source} has no {block}; expected blocks up to {last}; "
                f"type --config.init.map={quoted(_even_map(num_there, num_here))}"
            )


def _misfit(config, stored, source, problems, ours, theirs):
    """What does not fit, and what to type: the fields in which the models differ, or else the
    first of those weights; a few can be left out, whole blocks as one expression."""
    remedies, names = [], ours.keys() | theirs.keys()
    fields = [n for n in differences(config, stored, [SHAPE]) if not _is_covered(n, config, stored)]
    if fields:
        why = described(config, stored, fields)
        remedies.append(f"{as_flags(stored, fields)} to build that model")
    else:
        why = "; ".join([*problems.values()][:3]) + (", ..." if len(problems) > 3 else "")
    if _is_unmapped(config.init.map, ours, theirs):
        if all(map(_BLOCK.match, problems)):
            spread = quoted(_even_map(_num_skips(theirs), _num_skips(ours)))
            remedies.append(f"--config.init.map={spread} to choose each block's source")
    elif len(problems) <= len(names) / 2:
        bad, flags = problems.keys(), {}
        for field, members in (("reinit", bad & ours.keys()), ("ignore", bad - ours.keys())):
            if members:
                expressions = ", ".join(repr(e) for e in _expressions(members, names))
                flags[field] = f'--config.init.{field}="({expressions},)"'
        purposes = {"reinit": "start these afresh", "ignore": "leave these out"}
        remedies.append(f"{' '.join(flags.values())} to {' and '.join(purposes[f] for f in flags)}")
    remedies.append("--config.init.path='' for fresh weights")
    return (
        f"init.path: {len(problems)} of {len(names)} weights of {source} do not fit this model: "
        f"{why}; type {', or '.join(remedies)}"
    )


def _is_unmapped(text, ours, theirs):
    """Whether the networks have blocks on their sides, of other numbers, and `init.map` is ""."""
    there, here = _num_skips(theirs), _num_skips(ours)
    return not text and there != here and there * here != 0


def _is_covered(field, config, stored):
    """Whether a rule carries weights over although the models differ in this field."""
    old, new = resize.geometry(stored), resize.geometry(config)
    if field in ("model.patch_size", "data.channels"):
        return resize.change("patch_embed/kernel", old, new) is not None
    if field == "model.depth":
        depths = [resolved(each, field) // 2 for each in (config, stored)]
        return config.init.map != "" or depths[0] == depths[1]
    if field == "mask.hidden":
        return config.mask.hidden == "drop"  # parameters of pooled tokens are left out
    # The optimizer and its averages may differ: only weights are loaded.
    return field in ("data.image_size", "model.num_classes") or field.startswith("optim.")


def _num_skips(names):
    return 1 + max((int(found[2]) for name in names if (found := _BLOCK.match(name))), default=-1)


def _even_map(num_there, num_here):
    """`init.map` from so many blocks on each side to so many, spread evenly; the out-blocks in
    reverse, since out_block_0 takes the skip of the last in-block."""
    spread = [i * num_there // num_here for i in range(num_here)]
    back = [num_there - 1 - i for i in reversed(spread)]
    return f"in_block={','.join(map(str, spread))} out_block={','.join(map(str, back))}"


def _expressions(problems, names):
    """Regular expressions for the names of `problems`: one for a block of which none fits, and one
    for a parameter that fits in no block."""
    found = []
    for name in sorted(problems):
        block, _, part = name.partition("/")
        block_fits = {n for n in names if n.partition("/")[0] == block} - problems
        part_fits = {n for n in names if n.partition("/")[2] == part} - problems
        if part and not block_fits:
            found.append(f"{block}/.*")
        elif part and not part_fits and _BLOCK.match(name):
            found.append(f".*/{part}")
        else:
            found.append(name)
    # mid_block has its parameters in common with the others.
    found = [e for e in found if not any(x != e and re.fullmatch(x, e) for x in found)]
    return list(dict.fromkeys(found))


def _check_meaning(config, stored, source):
    allowed = config.init.allow
    names = [n for n in differences(config, stored, [MEANING]) if n not in allowed]
    if not names:
        return
    listed = ", ".join(f"'{name}'" for name in (*allowed, *names))
    as_trained = [n for n in names if get(stored, n) != "unknown"]
    use = f"{as_flags(stored, as_trained)} to keep their meaning, or " if as_trained else ""
    raise OtherRecipe(
        f"init.path: the weights of {source} mean something else: "
        f"{described(config, stored, names)}; type {use}"
        f'--config.init.allow="({listed},)" to start from them anyway',
        stored,
        as_trained,
    )


def _matches(patterns, name):
    return any(re.fullmatch(pattern, name) for pattern in patterns)
