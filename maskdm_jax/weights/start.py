"""Starts from other weights: stage 2 from stage 1's workdir, or from an official `.pt` file.

Weights that are missing, unexpected or of another shape are an error, except those that
`config.init.ignore` matches; an ignored weight starts fresh. So are weights that are not finite,
and weights that fit but mean something else: they were trained with another prediction, noise
schedule, number of timesteps, number of heads or patch grid, and `config.init.allow` does not list
that field. A `.pt` file does not hold its number of heads.

Parameters of pooled tokens have no place in a model without such tokens: they are left out.
"""

import re
from collections.abc import Callable

import jax
import numpy as np

from maskdm_jax import averages, checkpoint, phases
from maskdm_jax.config import as_flags, described, differences, get
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import MEANING, SHAPE
from maskdm_jax.run import faults, files
from maskdm_jax.weights import torch_io

_GRID = ("data.image_size", "model.patch_size")
_POOLED = "pooled/"  # the parameters of `model.pooling`


def load_params(config, make_fresh: Callable, schedule_of: Callable[[np.ndarray], str]):
    """Parameters from `config.init`.

    Args:
      config: the run's. Its `init` has path (a workdir, or an official .pt file), weights ("raw" or
        "ema"), ignore (regular expressions, each matched against whole names such as
        "mid_block/qkv/kernel"), and allow (fields that may differ, see the module).
      make_fresh: () -> fresh parameters, which give the expected shapes; computed only if `ignore`
        leaves some fresh.
      schedule_of: betas -> the name of their noise schedule; a .pt file holds its betas.

    Returns:
      (float32 parameters with the structure of `make_fresh`'s, one sentence on what was loaded).

    Raises:
      ConfigError: naming the weights that do not fit, or the fields that give them another
        meaning; also if they are not finite, or the path holds no weights.
    """
    init = config.init
    loaded, stored, source = _read(config, schedule_of)
    expected = jax.eval_shape(make_fresh)
    ours = _flatten(expected)
    theirs = _flatten(loaded)
    pooled = [] if any(map(_is_pooled, ours)) else [n for n in theirs if _is_pooled(n)]
    if pooled:
        theirs = {n: x for n, x in theirs.items() if n not in pooled}
        stored.mask.hidden = config.mask.hidden

    patterns = [re.compile(pattern) for pattern in init.ignore]

    def ignored(name):
        return any(pattern.fullmatch(name) for pattern in patterns)

    problems = {}
    for name in sorted(ours.keys() | theirs.keys()):
        if ignored(name):
            continue
        if name not in theirs:
            problems[name] = f"missing {name} {list(ours[name].shape)}"
        elif name not in ours:
            problems[name] = f"unexpected {name} {list(theirs[name].shape)}"
        elif ours[name].shape != theirs[name].shape:
            problems[name] = (
                f"{name} has shape {list(theirs[name].shape)}, expected {list(ours[name].shape)}"
            )
    if problems:
        raise ConfigError(_misfit(config, stored, source, problems, ours.keys() | theirs.keys()))

    left = [n for n in ours if ignored(n)]
    _check_meaning(config, stored, source, left)
    fresh = _flatten(make_fresh()) if left else {}
    used = {n: theirs[n] for n in ours if n not in left}
    if used:
        other = "--config.init.path=PATH of another one"
        faults.check_finite(used, f"init.path {source}", other)
    leaves = [np.asarray(fresh[n] if n in left else theirs[n], np.float32) for n in ours]
    params = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    note = f"loaded {len(ours) - len(left)} weights from {source}"
    if left:
        note += f"; fresh because of init.ignore: {', '.join(left)}"
    if pooled:
        note += f"; left out its {len(pooled)} weights of pooled tokens, which this model lacks"
    return params, note


def _read(config, schedule_of):
    """(parameters, the config that they were trained with, a phrase for their source)."""
    init = config.init
    path = files.local_path(init.path, "init.path")
    expected = (
        "expected another run's workdir, or an official .pt file with tensors only; type "
        "--config.init.path=PATH"
    )
    if not path.exists():
        raise ConfigError(f"init.path {init.path} does not exist; {expected}")
    if path.is_file():
        try:
            params, betas, *_ = torch_io.load_official(str(path), init.weights)
        except ValueError as error:
            raise ConfigError(f"init.path: {error}; {expected}") from error
        except ImportError as error:
            raise ConfigError(f"init.path: {error}") from error
        # All that is known of the shape and the meaning of such a file's weights.
        stored = config.copy_and_resolve_references()
        stored.model.width = params["position"].shape[-1]
        stored.model.depth = sum(name.startswith("in_block_") for name in params) * 2 + 1
        stored.diffusion.update(framework="ddpm", prediction="eps")
        stored.mask.hidden, stored.model.wavelet = "drop", "none"
        if betas is not None:
            stored.diffusion.num_timesteps = len(betas)
            stored.diffusion.schedule = schedule_of(betas)
        return params, stored, str(path)
    # The folder of all checkpoints, or of one, instead of the workdir.
    runs = [parent for parent in path.parents[:2] if checkpoint.steps(parent)]
    step = checkpoint.find_step(
        path, instead=f"--config.init.path={runs[0] if runs else 'PATH of such a workdir'}"
    )
    item = {"raw": "params", "ema": "ema"}[init.weights]
    params = checkpoint.restore_item(path, step, item)
    stored = phases.at(checkpoint.load_config(path, step), step).config
    if init.weights == "ema":
        params = averages.kept(params, stored)
    return params, stored, f"{path} ({init.weights}, step {step})"


def _misfit(config, stored, source, problems, names):
    """What does not fit, and what to type: the fields in which the models differ, or else the
    first of those weights; a few can be left out, whole blocks as one expression."""
    remedies = []
    # The optimizer and its averages may differ: only weights are loaded.
    fields = [n for n in differences(config, stored, [SHAPE]) if not n.startswith("optim.")]
    if fields:
        why = described(config, stored, fields)
        remedies.append(f"{as_flags(stored, fields)} to build that model")
    else:
        why = "; ".join([*problems.values()][:3]) + (", ..." if len(problems) > 3 else "")
    if len(problems) <= len(names) / 2:
        expressions = ", ".join(repr(e) for e in _expressions(problems, names))
        remedies.append(f'--config.init.ignore="({expressions},)" to leave these out')
    remedies.append("--config.init.path='' for fresh weights")
    return (
        f"init.path: {len(problems)} of {len(names)} weights of {source} do not fit this model: "
        f"{why}; type {', or '.join(remedies)}"
    )


def _expressions(problems, names):
    """Regular expressions for the names of `problems`, one for a block of which none fits."""
    for block in dict.fromkeys(name.partition("/")[0] for name in problems):
        members = {name for name in names if name.partition("/")[0] == block}
        bad = sorted(members & problems.keys())
        yield from bad if len(bad) < len(members) or bad == [block] else [f"{block}/.*"]


def _check_meaning(config, stored, source, left):
    allowed = config.init.allow
    different = differences(config, stored, [MEANING])
    if "position" not in left:
        # Two grids with the same number of patches: a row would stand for another place.
        different += [n for n in _GRID if n in differences(config, stored, [SHAPE])]
    names = [n for n in different if n not in allowed]
    if not names:
        return
    listed = ", ".join(f"'{name}'" for name in (*allowed, *names))
    as_trained = [n for n in names if get(stored, n) != "unknown"]
    use = f"{as_flags(stored, as_trained)} to keep their meaning, or " if as_trained else ""
    raise ConfigError(
        f"init.path: the weights of {source} mean something else: "
        f"{described(config, stored, names)}; type {use}"
        f'--config.init.allow="({listed},)" to start from them anyway'
    )


def _is_pooled(name):
    return name.startswith(_POOLED)


def _flatten(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
