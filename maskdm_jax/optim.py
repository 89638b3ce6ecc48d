"""AdamW, learning-rate schedules and clipping from Optax, and the EMA of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

_EMA_COPY_UPDATES = 100
# The two averages that `optim.ema = "power"` keeps, by the standard deviation of their profiles
# (Karras et al. 2024).
POWER_STDS = {"short": 0.05, "long": 0.1}


def learning_rate(config, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant or cosine to 0 after `num_steps` updates."""
    optim = config.optim
    warmup = optim.warmup_steps
    if optim.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(optim.lr_peak, max(num_steps - warmup, 1))
    else:
        after = optax.constant_schedule(optim.lr_peak)
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, optim.lr_peak, warmup), after], [warmup]
    )


def make_optimizer(config, num_steps: int) -> optax.GradientTransformation:
    """Clipping if `optim.clip_norm` is set, then AdamW with decay on every parameter.

    `num_steps` is the number of updates over which the learning rate decays.

    The state has the same structure with and without clipping, so a run can resume with either.
    """
    optim = config.optim
    adamw = optax.adamw(
        learning_rate(config, num_steps), b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay
    )
    clip = _clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    return optax.chain(clip, adamw)


def with_moments(opt_state, old):
    """A fresh optimizer state with the moments of `old` for the weights whose shape stays.

    The count that the learning rate depends on stays that of `opt_state`.
    """
    known = jax.tree_util.tree_leaves_with_path(old, is_leaf=_is_schedule)
    known = {jax.tree_util.keystr(path): leaf for path, leaf in known}

    def chosen(path, fresh):
        before = known.get(jax.tree_util.keystr(path))
        if _is_schedule(fresh) or before is None or before.shape != fresh.shape:
            return fresh
        return before

    return jax.tree_util.tree_map_with_path(chosen, opt_state, is_leaf=_is_schedule)


def with_schedule_count(opt_state, count: int):
    """An optimizer state whose learning rate is that after `count` updates."""

    def counted(part):
        if not _is_schedule(part):
            return part
        return part._replace(count=jax.device_put(np.int32(count), part.count.sharding))

    return jax.tree.map(counted, opt_state, is_leaf=_is_schedule)


def _is_schedule(part):
    return isinstance(part, optax.ScaleByScheduleState)


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
