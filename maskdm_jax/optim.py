"""AdamW and Muon from Optax, the learning rate, clipping, and the EMA of the parameters."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_BLOCK_MATRIX = re.compile(r"block\w*/(qkv|proj|mlp_in|mlp_out|skip)/kernel$")
_EMA_COPY_UPDATES = 100
# The two averages that `optim.ema = "power"` keeps, by the standard deviation of their profiles
# (Karras et al. 2024).
POWER_STDS = {"short": 0.05, "long": 0.1}


class Schedule(NamedTuple):
    """The numbers of a learning rate, float32 scalars; counts are of updates.

    They are inputs of the compiled step, so that it serves any of them.
    """

    peak: jax.Array
    end: jax.Array  # a share of the peak
    warmup: jax.Array
    decay_start: jax.Array
    decay_steps: jax.Array


def schedule(config, num_steps: int) -> Schedule:
    """The numbers of `learning_rate` for a run, or a phase, of `num_steps` updates."""
    optim = config.optim
    length = max(num_steps - optim.warmup_steps, 1)
    decay = length
    if optim.lr_schedule == "wsd":
        decay = max(min(round(optim.lr_decay_share * num_steps), length), 1)
    start = optim.warmup_steps + length - decay
    return Schedule(
        *map(np.float32, (optim.lr_peak, optim.lr_end, optim.warmup_steps, start, decay))
    )


def learning_rate(name: str, numbers: Schedule, count: jax.Array) -> jax.Array:
    """The rate after `count` updates: linear warm-up from 0 to the peak, then `optim.lr_schedule`.

    "constant" stays at the peak. The others end at `lr_end` x `lr_peak` after `num_steps` updates:
    "cosine" and "linear" fall from the warm-up on. "wsd" (warm-up, stable, decay; Hu et al. 2024)
    falls only during the last `lr_decay_share` of the updates, as 1 - sqrt (Haegele et al. 2024).

    The warm-up comes first: a decay starts at its end at the earliest, and if the warm-up lasts
    `num_steps` or longer, there is no decay.

    Args:
      name: `optim.lr_schedule`.
      numbers: of `schedule`.
      count: int32 scalar.

    Returns:
      A float32 scalar.
    """
    progress = jnp.clip((count - numbers.decay_start) / numbers.decay_steps, 0, 1)
    left = {
        "constant": jnp.ones_like(progress),
        "cosine": (1 + jnp.cos(jnp.pi * progress)) / 2,
        "linear": 1 - progress,
        "wsd": 1 - jnp.sqrt(progress),
    }[name]
    share = jnp.where(
        count < numbers.warmup,
        count / jnp.maximum(numbers.warmup, 1),
        numbers.end + (1 - numbers.end) * left,
    )
    return numbers.peak * share


def make_optimizer(config, numbers: Schedule) -> optax.GradientTransformationExtraArgs:
    """Clipping if `optim.clip_norm` is set, then AdamW, or Muon on the matrices of the blocks.

    Each update also subtracts learning rate x `optim.weight_decay` x the parameter, for `decay_on`
    "all" from every parameter, for "matrices" from the kernels of all linear layers, and so from no
    bias, no LayerNorm, and no table of positions or classes.

    Clipping and decay do not change the state's structure, so a run can resume with others.
    `numbers` are the learning rate's. `update` is also given `count`, on which that depends.
    """
    optim = config.optim
    scale = optax.scale_by_adam(b1=optim.b1, b2=optim.b2)
    if optim.name == "muon":
        scale = optax.partition({"muon": _scale_by_muon(), "adam": scale}, _label)
    rate = functools.partial(learning_rate, optim.lr_schedule, numbers)
    steps = optax.chain(scale, _decay_weights(optim), _scale_by_rate(rate))
    clip = _clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    return optax.chain(clip, steps)


def _scale_by_rate(rate):
    """Optax's, but of the count that is given: its own stands still in a skipped update."""
    scale = optax.scale_by_learning_rate(rate)

    def update(updates, state, params=None, *, count):
        return scale.update(updates, state._replace(count=count), params)

    return optax.GradientTransformationExtraArgs(scale.init, update)


def _decay_weights(optim):
    if optim.decay_on == "all":
        return optax.add_decayed_weights(optim.weight_decay)

    def decay(updates, params):
        return _map_named(
            lambda name, u, p: u + optim.weight_decay * p if name.endswith("kernel") else u,
            updates,
            params,
        )

    return optax.stateless(decay)  # not a mask, which would change the state's structure


def _label(params):
    """Which rule updates each parameter: Muon the linear layers of the blocks, Adam the others."""
    return _map_named(lambda name, _: "muon" if _BLOCK_MATRIX.search(name) else "adam", params)


def _scale_by_muon():
    """Muon (Jordan et al. 2024): the momentum with its singular values set to about 1.

    q, k and v are three matrices. An update is scaled by 0.2 sqrt(max(in, out)) (Liu et al. 2025),
    which makes its root mean square 0.2, about that of Adam: both share one learning rate. The
    momentum's decay is 0.95, as in both papers.
    """
    inner = optax.contrib.scale_by_muon(
        beta=0.95,
        weight_dimension_numbers=lambda stacks: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), stacks
        ),
    )

    def split(name, x):
        return x.reshape(len(x), 3, -1) if name.endswith("qkv/kernel") else x

    def init(params):
        return inner.init(_map_named(split, params))

    def update(updates, state, params=None):
        # All matrices of one shape at once: one by one, a U-ViT-S takes over 1,000 small matmuls.
        stacks, unstack = _stacked(_map_named(split, updates))
        stacks, new = inner.update(stacks, state._replace(mu=_stacked(state.mu)[0]))
        scaled = {(i, o): 0.2 * max(i, o) ** 0.5 * stack for (i, o), stack in stacks.items()}
        updates = jax.tree.map(lambda x: x.reshape(len(x), -1), unstack(scaled))
        return updates, new._replace(mu=unstack(new.mu))

    return optax.GradientTransformation(init, update)


def _stacked(tree):
    """The matrices of a tree of [in, out] and [in, 3, out], stacked by shape, and the way back.

    Returns:
      ({(in, out): [count, in, out]}, a function from such stacks to the tree).
    """
    leaves, treedef = jax.tree.flatten(tree)
    groups, places = {}, []
    for x in leaves:
        group = groups.setdefault((x.shape[0], x.shape[-1]), [])
        places.append(len(group))
        group += [x] if x.ndim == 2 else [x[:, i] for i in range(x.shape[1])]

    def unstack(stacks):
        def leaf(x, first):
            stack = stacks[x.shape[0], x.shape[-1]]
            if x.ndim == 2:
                return stack[first]
            return jnp.moveaxis(stack[first : first + x.shape[1]], 0, 1)

        return treedef.unflatten(map(leaf, leaves, places))

    return {shape: jnp.stack(group) for shape, group in groups.items()}, unstack


def _map_named(function, tree, *others):
    """`jax.tree.map` of a function that is also given each leaf's name, "mid_block/qkv/kernel"."""

    def named(path, *leaves):
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves)

    return jax.tree_util.tree_map_with_path(named, tree, *others)


def with_moments(opt_state, old):
    """A fresh optimizer state with the moments of `old` for the weights whose shape stays."""
    known = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(old)
    }

    def chosen(path, fresh):
        before = known.get(jax.tree_util.keystr(path))
        return fresh if before is None or before.shape != fresh.shape else before

    return jax.tree_util.tree_map_with_path(chosen, opt_state)


def global_norm(tree) -> jax.Array:
    """The L2 norm over all leaves, a float32 scalar.

    `optax.tree.norm` sums leaf by leaf, which takes 160 more kernels on a GPU. This sums rows, then
    all row sums at once.
    """
    squares = [jnp.square(x.astype(jnp.float32)) for x in jax.tree.leaves(tree)]
    sums = [jnp.sum(x, axis=-1) if x.ndim > 1 else x for x in squares]
    # Without the barrier, XLA splits the last sum up again.
    joined = jax.lax.optimization_barrier(jnp.concatenate([x.ravel() for x in sums]))
    return jnp.sqrt(jnp.sum(joined))


def _clip_by_global_norm(max_norm):
    def clip(grads, params):
        scale = max_norm / jnp.maximum(global_norm(grads), max_norm)
        return jax.tree.map(lambda x: x * scale, grads)

    return optax.stateless(clip)


def ema_decay(step: jax.Array, decay: float, ramp: bool) -> jax.Array:
    """The EMA's decay at the update that follows `step` completed updates, a float32 scalar.

    With `ramp`, the official rule: 0 (a copy) for the first 100 updates, then 1 - (1 + n)^(-2/3)
    up to `decay`, where n counts the updates since.
    """
    if not ramp:
        return jnp.float32(decay)
    n = jnp.maximum(step - _EMA_COPY_UPDATES, 0).astype(jnp.float32)
    return jnp.where(step < _EMA_COPY_UPDATES, 0.0, jnp.minimum(1 - (1 + n) ** (-2 / 3), decay))


def power_gamma(std: float) -> float:
    """The exponent gamma of the average t^gamma whose profile has that standard deviation.

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), in units of the training time; below 0.289.
    """
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots[np.isreal(roots)].real.max())


def init_ema(params, config):
    """The average of `params` alone, as `optim.ema` keeps it: a copy, or one for each length."""
    if config.optim.ema == "power":
        return {name: jax.tree.map(jnp.copy, params) for name in POWER_STDS}
    return jax.tree.map(jnp.copy, params)


def update_ema(ema, params, step: jax.Array, config):
    """The average after the update that gave `params`, and that followed `step` others."""
    if config.optim.ema == "power":
        n = step.astype(jnp.float32) + 1
        # 1 - (1 - 1/n)^(gamma + 1); as written, it has few digits in float32 once n is large.
        exponents = {name: power_gamma(std) + 1 for name, std in POWER_STDS.items()}
        rates = {name: -jnp.expm1(power * jnp.log1p(-1 / n)) for name, power in exponents.items()}
        return {k: optax.incremental_update(params, ema[k], rate) for k, rate in rates.items()}
    decay = ema_decay(step, config.optim.ema_decay, config.optim.ema_ramp)
    return optax.incremental_update(params, ema, 1 - decay)
