"""From the state at the end of a phase to the state with which the next one starts.

A checkpoint at the boundary holds the state of the phase that ends, and this is a function of that
state alone: a run that resumes there goes through the same transition.
"""

import warnings
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from maskdm_jax import optim
from maskdm_jax.phases import Phase
from maskdm_jax.state import TrainState, abstract_state, fresh_params
from maskdm_jax.weights import resize, rules


def enter(phase: Phase, before: Phase, state: TrainState, mesh: Mesh) -> TrainState:
    """The first state of `phase`, from the last state of the phase `before`, which is donated.

    Weights are carried over by the rules of `weights.rules`; the averaged weights likewise, or they
    start anew (`optim.ema_at_phase`). Moments start at zero, or are kept for weights whose
    shape stays (`optim.moments_at_phase`).
    """
    config, plan = phase.config, _plan(phase, before, mesh)

    def made(state, seed):
        fresh = fresh_params(config, mesh, seed)
        params = plan.carried(state.params, fresh)
        if phase.ema_first_step == phase.first_step:
            ema = optim.init_ema(params, config)
        else:
            ema = plan.carried(state.ema, fresh)
        rate = optim.schedule(config, phase.num_steps)
        opt_state = optim.make_optimizer(config, rate).init(params)
        if config.optim.moments_at_phase == "keep":
            opt_state = optim.with_moments(opt_state, state.opt_state)
        return TrainState(step=state.step, params=params, ema=ema, opt_state=opt_state)

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    # Unused, donated arrays lend their memory to the new state, which otherwise needs its own.
    jitted = jax.jit(made, donate_argnums=0, keep_unused=True, out_shardings=shardings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return jitted(state, np.int32(config.seed))


def described(phase: Phase, before: Phase, mesh: Mesh) -> str:
    """One line on what `enter` does with the weights."""
    rows, parts = _plan(phase, before, mesh).rows, []
    for outcome in ("restored", "resized", "left out", "fresh"):
        names = [row.name for row in rows if row.outcome == outcome]
        if outcome == "restored":
            parts.append(f"{len(names)} weights kept")
        else:
            parts.append(f"{len(names)} {outcome}" + (f" ({', '.join(names)})" if names else ""))
    return f"phase {phase.index + 1} starts after step {phase.first_step}: {', '.join(parts)}"


class _Plan(NamedTuple):
    """What becomes of each parameter between two networks of these geometries."""

    rows: list[rules.Row]
    old: resize.Geometry
    new: resize.Geometry

    def carried(self, params, fresh):
        """A tree like `fresh`, from the tree `params`."""
        theirs, ours = rules.by_name(params), rules.by_name(fresh)
        made = rules.carried(self.rows, theirs, ours, self.old, self.new)
        return jax.tree.unflatten(jax.tree.structure(fresh), [made[name] for name in ours])


def _plan(phase, before, mesh):
    theirs, ours = (
        rules.by_name(abstract_state(each.config, mesh).params) for each in (before, phase)
    )
    old, new = resize.geometry(before.config), resize.geometry(phase.config)

    def stays_fresh(name):  # pooled tokens come, or have another size
        same = name in theirs and theirs[name].shape == ours[name].shape
        return "pooled tokens" if name.startswith(rules.POOLED) and not same else ""

    rows, problems = rules.plan(theirs, ours, old, new, {}, stays_fresh, lambda name: False)
    assert not problems, problems  # `phases.validate` refuses what no rule covers
    return _Plan(rows, old, new)
