"""Timing: after warm-up, the median of several groups of calls."""

import datetime
import importlib.metadata
import platform
import statistics
import time

import jax
import jax.numpy as jnp

_GROUPS = 3
_MATMUL_SIZE = 8192


def seconds_per_call(call, seconds: float, warm_up: int = 5) -> float:
    """Seconds that one call takes, with the device's queue kept full.

    Args:
      call: (i) -> device arrays, for i = 0, 1, ...; each may depend on the one before.
      seconds: roughly how long to measure; the median of three groups counts.
      warm_up: calls before the clock starts.
    """
    for i in range(warm_up):
        out = call(i)
    jax.block_until_ready(out)
    start = time.perf_counter()
    jax.block_until_ready(call(warm_up))
    calls = max(int(seconds / _GROUPS / (time.perf_counter() - start)), 2)
    rates = []
    for group in range(_GROUPS):
        start = time.perf_counter()
        for i in range(calls):
            out = call(warm_up + 1 + group * calls + i)
        jax.block_until_ready(out)
        rates.append((time.perf_counter() - start) / calls)
    return statistics.median(rates)


def matmul_tflops(seconds: float = 1.5) -> float:
    """This card's rate in one large bfloat16 matmul on random data, in TFLOP/s."""
    size = _MATMUL_SIZE
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
    matmul = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds_per_call(lambda i: matmul(a, b), seconds) / 1e12


def versions() -> dict[str, str]:
    """Versions of the software that the figures depend on."""
    names = ("jax", "jaxlib", "flax")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def today() -> str:
    return datetime.date.today().isoformat()
