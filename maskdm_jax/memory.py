"""Device memory: what a compiled step needs, the largest batch that fits, and what to do when none
does. All figures are the compiler's own memory analysis, per device, and nothing is run.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import jax

from maskdm_jax.config import ConfigError

# What `main.py` lets JAX take of a GPU; the rest is for cuDNN's and NCCL's own workspaces.
GPU_MEMORY_FRACTION = "0.92"

# Sizes of data-centre GPUs, in GB (1e9 bytes), that a dry run answers for.
CARDS_GB = (80, 140)


def bytes_needed(compiled) -> int | None:
    """Bytes of arguments, outputs and temporaries on each device; None where it is not known."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    # Donated inputs share their memory with outputs.
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def bytes_limit(device: jax.Device) -> int | None:
    """Bytes that the allocator may use on `device`; None where it is not known (a CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def usable_bytes(card_gb: float) -> int:
    """What JAX may take of a GPU of `card_gb` x 1e9 bytes."""
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION))
    return int(card_gb * 1e9 * fraction)


def largest_batch(
    needs: Callable[[int], int], batch: int, multiple: int, limit: int
) -> tuple[int, int]:
    """The largest batch, a multiple of `multiple`, whose step needs at most `limit` bytes.

    Memory grows almost in proportion to the batch, so each try is the secant's answer; the result
    was itself compiled and found to fit, and the try above it, at most 5 % larger, was not.

    Args:
      needs: batch -> bytes; compiles, so it is slow.
      batch: where to start; a multiple of `multiple`.
      multiple: devices x accumulation steps.
      limit: bytes.

    Returns:
      (batch, bytes); (0, bytes of the smallest batch) where not even that fits.
    """
    low, low_bytes = multiple, needs(multiple)
    if low_bytes > limit:
        return 0, low_bytes
    high = None  # the smallest batch that is known not to fit
    known = {low: low_bytes}
    guess = max(batch, 2 * multiple)
    while high is None or (high - low > multiple and high > 1.05 * low):
        known[guess] = known.get(guess) or needs(guess)
        if known[guess] <= limit:
            low = guess
        else:
            high = guess
        (a, bytes_a), (b, bytes_b) = sorted(known.items())[0], max(known.items())
        slope = max((bytes_b - bytes_a) / (b - a), 1)
        guess = int(a + (limit - bytes_a) / slope) // multiple * multiple
        # The secant's answer may be one that is known; then the next step towards the gap.
        guess = max(guess, low + multiple)
        if high is not None:
            guess = min(guess, high - multiple)
    return low, known[low]


def advice(config) -> str:
    """What to type when memory runs out, the cheapest in speed first."""
    multiple = config.optim.accumulate_steps * 2
    tries = []
    if config.train.batch_size % multiple == 0:
        tries.append(
            f"--config.optim.accumulate_steps={multiple} (the same updates, in smaller pieces)"
        )
    if config.model.remat == "none":
        tries.append("--config.model.remat=blocks (recomputes activations)")
    if jax.device_count() > config.mesh.fsdp:
        tries.append(f"--config.mesh.fsdp={jax.device_count()} (splits parameters and optimizer)")
    if config.data.cache == "device":
        tries.append("--config.data.cache=host (keeps the images off the device)")
    half = max(config.train.batch_size // 2, 1)
    tries.append(f"--config.train.batch_size={half}")
    return "; ".join(tries)


@contextlib.contextmanager
def explained(config) -> Iterator[None]:
    """Turns the runtime's out-of-memory error into one that says what to type.

    Raises:
      ConfigError: where the block ran out of device memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"out of device memory at train.batch_size {config.train.batch_size} on "
            f"{jax.device_count()} x {jax.devices()[0].device_kind} ({reason}); type, in this "
            f"order: {advice(config)}; --config.train.dry_run=True tells what fits"
        ) from error
