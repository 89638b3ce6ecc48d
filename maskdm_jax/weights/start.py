"""Starts from other weights: stage 2 from stage 1's workdir, or from an official `.pt` file.

Weights that are missing, unexpected or of another shape are listed in one error, except those that
`config.init.ignore` matches; an ignored weight starts fresh. Weights that fit but mean something
else are an error too: they were trained with another prediction, noise schedule, number of
timesteps, number of heads or patch grid, and `config.init.allow` does not list that field. A `.pt`
file does not hold its number of heads.
"""

import re
from collections.abc import Callable

import jax
import numpy as np

from maskdm_jax import checkpoint
from maskdm_jax.config import as_flags, described, differences, get
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import MEANING, SHAPE
from maskdm_jax.run import files
from maskdm_jax.weights import torch_io

_GRID = ("data.image_size", "model.patch_size")


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
      ConfigError: listing every weight that does not fit, or every field that gives the weights
        another meaning; also if the path holds no weights.
    """
    init = config.init
    loaded, stored, source = _read(config, schedule_of)
    expected = jax.eval_shape(make_fresh)
    ours = _flatten(expected)
    theirs = _flatten(loaded)

    try:
        patterns = [re.compile(pattern) for pattern in init.ignore]
    except re.error as error:
        raise ConfigError(
            f"init.ignore {init.ignore}: {error}; expected regular expressions over names such as "
            "mid_block/qkv/kernel"
        ) from error

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
        names = ", ".join(f"'{name}'" for name in problems)
        raise ConfigError(
            f"init.path: {len(problems)} weights of {source} do not fit this model: "
            f"{'; '.join(problems.values())}; set the model as in that run, or leave these out: "
            f'--config.init.ignore="({names},)"'
        )

    left = [n for n in ours if ignored(n)]
    _check_meaning(config, stored, source, left)
    fresh = _flatten(make_fresh()) if left else {}
    leaves = [np.asarray(fresh[n] if n in left else theirs[n], np.float32) for n in ours]
    params = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    note = f"loaded {len(ours) - len(left)} weights from {source}"
    return params, note + (f"; fresh because of init.ignore: {', '.join(left)}" if left else "")


def _read(config, schedule_of):
    """(parameters, the config that they were trained with, a phrase for their source)."""
    init = config.init
    path = files.local_path(init.path, "init.path")
    if not path.exists():
        raise ConfigError(
            f"init.path {init.path} does not exist; expected the --workdir of a pre-training run, "
            "or an official .pt file; type --config.init.path=THAT_WORKDIR"
        )
    if path.is_file():
        try:
            params, betas = torch_io.load_official(str(path), init.weights)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"init.path: {error}") from error
        # All that is known of the meaning of such a file's weights.
        stored = config.copy_and_resolve_references()
        stored.diffusion.prediction = "eps"
        if betas is not None:
            stored.diffusion.num_timesteps = len(betas)
            stored.diffusion.schedule = schedule_of(betas)
        return params, stored, str(path)
    step = checkpoint.find_step(path)
    item = {"raw": "params", "ema": "ema"}[init.weights]
    params = checkpoint.restore_item(path, step, item)
    stored = checkpoint.load_config(path, step)
    return params, stored, f"{path} ({init.weights}, step {step})"


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


def _flatten(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
