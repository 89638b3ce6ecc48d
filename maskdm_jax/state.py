"""TrainState: all of a run's state except its config. Every leaf is float32 or int32."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from maskdm_jax import optim, rng, sharding
from maskdm_jax.model import uvit


@flax.struct.dataclass
class TrainState:
    """The number of completed updates, the parameters, their EMA, and the optimizer's state."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def abstract_state(config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings on `mesh` of a phase's state; nothing is computed."""
    return _abstract_state(FrozenConfigDict(config), mesh)


@functools.lru_cache(maxsize=1)  # tracing is slow, and set-up calls this several times
def _abstract_state(config, mesh):
    return sharding.abstract(lambda: _create(config, mesh), mesh)


def init_state(config, mesh: Mesh, params=None) -> TrainState:
    """A state at step 0 on the devices of `mesh`, with `params`, or fresh ones if None."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    # The seed is an input, so that the compilation cache has one program for all seeds.
    create = jax.jit(functools.partial(_create, config, mesh), out_shardings=shardings)
    return create(np.int32(config.seed), params)


def fresh_params(config, mesh: Mesh, seed: jax.Array | None = None):
    """The random parameters that a run starts with by default.

    Args:
      config, mesh: the run's.
      seed: the run's as a traced scalar; None takes `config.seed`.
    """
    seed = config.seed if seed is None else seed
    return uvit.init_params(uvit.make_model(config, mesh), rng.stream(seed, "init"))


def _create(config, mesh, seed=None, params=None):
    params = fresh_params(config, mesh, seed) if params is None else params
    # The EMA needs its own buffers: the step donates its input, and no buffer can be donated twice.
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema=optim.init_ema(params, config),
        opt_state=optim.make_optimizer(config, optim.schedule(config, config.train.num_steps)).init(
            params
        ),
    )
