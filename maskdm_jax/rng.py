"""Named random streams: everything random is a pure function of (seed, name, step).

Nothing random is therefore part of a checkpoint. Keys are drawn for the global batch under jit, so
the numbers do not depend on how many devices or hosts share it.
"""

import zlib

import jax


def stream(seed: int, name: str, step: int | jax.Array | None = None) -> jax.Array:
    """A key for the stream called `name`, at `step` where the stream has steps.

    Args:
      seed: the run's seed.
      name: what the numbers are for ("time", "mask", "noise", ...). Two names never share numbers.
      step: completed updates, an int or a traced int32 scalar.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)
