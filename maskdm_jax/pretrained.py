"""Starting from other weights: stage 2 from stage 1's workdir, or from an official `.pt` file.

A weight that is missing, unexpected or of another shape is an error that lists them all, unless
`config.init.ignore` names it; an ignored weight starts fresh.
"""

import pathlib
import re

import jax
import numpy as np

from maskdm_jax import checkpoint, torch_io
from maskdm_jax.config import ConfigError


def load_params(init, fresh):
    """Parameters from `config.init`.

    Args:
      init: path (a workdir, or an official .pt file), weights ("raw" or "ema"), ignore (regular
        expressions, each matched against whole names such as "mid_block/qkv/kernel").
      fresh: the new model's parameters, as arrays or shapes; their names and shapes are what is
        expected, and where they are arrays their values are what an ignored weight keeps.

    Returns:
      (params with `fresh`'s structure, one sentence that says what was loaded from where).

    Raises:
      ConfigError: naming every weight that does not fit, or a path that holds no weights.
    """
    loaded, source = _read(init)
    ours = _flatten(fresh)
    theirs = _flatten(loaded)

    def ignored(name):
        return any(re.fullmatch(pattern, name) for pattern in init.ignore)

    problems = []
    for name in sorted(ours.keys() | theirs.keys()):
        if ignored(name):
            continue
        if name not in theirs:
            problems.append(f"missing {name} {list(ours[name].shape)}")
        elif name not in ours:
            problems.append(f"unexpected {name} {list(theirs[name].shape)}")
        elif ours[name].shape != theirs[name].shape:
            problems.append(
                f"{name} has shape {list(theirs[name].shape)}, expected {list(ours[name].shape)}"
            )
    if problems:
        raise ConfigError(
            f"init.path: {len(problems)} weights of {source} do not fit this model: "
            f"{'; '.join(problems)}; set the model as in that run, or name what is to start fresh: "
            "--config.init.ignore=\"('position', 'output/.*')\""
        )

    taken = [n for n in ours if n in theirs and not ignored(n)]
    params = {n: np.asarray(theirs[n], np.float32) if n in taken else ours[n] for n in ours}
    params = jax.tree.unflatten(jax.tree.structure(fresh), [params[n] for n in ours])
    note = f"loaded {len(taken)} weights from {source}"
    left = [n for n in ours if n not in taken]
    return params, note + (f"; fresh, as init.ignore says: {', '.join(left)}" if left else "")


def _read(init):
    path = pathlib.Path(init.path).expanduser()
    if not path.exists():
        raise ConfigError(
            f"init.path {init.path} does not exist; expected the --workdir of a pre-training run, "
            "or an official .pt file; type --config.init.path=..."
        )
    if path.is_file():
        try:
            return torch_io.load_official(str(path), init.weights), str(path)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"init.path: {error}") from error
    step = checkpoint.find_step(path)
    item = {"raw": "params", "ema": "ema"}[init.weights]
    return checkpoint.restore_item(path, step, item), f"{path} ({init.weights}, step {step})"


def _flatten(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
