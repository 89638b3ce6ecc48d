"""Named random streams: everything random is a pure function of (seed, name, step).

Checkpoints therefore hold no random state. Numbers are drawn for the global batch under jit, so
they do not depend on how many devices or hosts share it.
"""

import zlib

import jax


def stream(seed: int | jax.Array, name: str, step: int | jax.Array | None = None) -> jax.Array:
    """The key of the stream `name`, at `step` if the stream has steps.

    Args:
      seed: the run's seed, an int or a traced int32 scalar.
      name: what the numbers are for ("time", "mask", "noise", ...); each name has its own numbers.
      step: completed updates, an int or a traced int32 scalar.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)
