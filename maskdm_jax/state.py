"""TrainState: all that a run is, beside its config. Every leaf is float32 or int32."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from maskdm_jax import rng, uvit


@flax.struct.dataclass
class TrainState:
    """Completed updates, the parameters, their EMA, and the optimizer's state."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def create_state(
    config, model: uvit.UViT, optimizer: optax.GradientTransformation, params=None
) -> TrainState:
    """A state at step 0, with fresh parameters unless some are given; call it under jit."""
    if params is None:
        params = uvit.init_params(model, rng.stream(config.seed, "init"))
    # The EMA is a copy of its own: the step donates its input, and donates no buffer twice.
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )
