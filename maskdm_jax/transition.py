"""From the state at the end of a phase to the state with which the next one starts.

A checkpoint at the boundary holds the state of the phase that ends, and this is a function of that
state alone: a run that resumes there goes through the same transition.
"""

import warnings

import jax
from jax.sharding import Mesh

from maskdm_jax import optim
from maskdm_jax.phases import Phase
from maskdm_jax.state import TrainState, abstract_state, fresh_params
from maskdm_jax.weights import resize


def enter(phase: Phase, before: Phase, state: TrainState, mesh: Mesh) -> TrainState:
    """The first state of `phase`, from the last state of the phase `before`, which is donated.

    Weights are carried over by the rules of `weights.resize`; the averaged weights likewise, or
    they start anew (`optim.ema_at_phase`). Moments start at zero, or are kept for weights whose
    shape stays (`optim.moments_at_phase`). The learning rate's count starts at 0.
    """
    config = phase.config
    old, new = resize.geometry(before.config), resize.geometry(config)

    def made(state):
        fresh = fresh_params(config, mesh)
        params = resize.carry(state.params, fresh, old, new)
        if phase.ema_first_step == phase.first_step:
            ema = optim.init_ema(params, config)
        else:
            ema = resize.carry(state.ema, fresh, old, new)
        opt_state = optim.make_optimizer(config, phase.num_steps).init(params)
        if config.optim.moments_at_phase == "keep":
            opt_state = optim.with_moments(opt_state, state.opt_state)
        return TrainState(step=state.step, params=params, ema=ema, opt_state=opt_state)

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    # Unused, donated arrays lend their memory to the new state, which otherwise needs its own.
    jitted = jax.jit(made, donate_argnums=0, keep_unused=True, out_shardings=shardings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return jitted(state)


def rescheduled(state: TrainState, count: int) -> TrainState:
    """A state with the learning rate of `count` updates, for a run whose phases were changed."""
    return state.replace(opt_state=optim.with_schedule_count(state.opt_state, count))


def described(phase: Phase, before: Phase, mesh: Mesh) -> str:
    """One line on what `enter` does with the weights."""
    given, fresh = (abstract_state(each.config, mesh).params for each in (before, phase))
    old, new = resize.geometry(before.config), resize.geometry(phase.config)
    found = resize.outcome(given, fresh, old, new)
    parts = [f"{len(found.kept)} weights kept"]
    for what, names in (
        ("resized", found.resized), ("left out", found.left_out), ("fresh", found.fresh),
    ):  # fmt: skip
        parts.append(f"{len(names)} {what}" + (f" ({', '.join(names)})" if names else ""))
    return f"phase {phase.index + 1} starts after step {phase.first_step}: {', '.join(parts)}"
