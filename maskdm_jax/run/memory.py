"""Device memory: what a compiled step needs, the largest batch that fits, and what to do when none
does. The figures are the compiler's own analysis of the program, per device; nothing is run.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import jax

from maskdm_jax import sharding
from maskdm_jax.errors import ConfigError
from maskdm_jax.run.progress import say
from maskdm_jax.step import lower_train_step

# Of a GPU's memory, what JAX takes at its start; the rest is for cuDNN's and NCCL's workspaces.
GPU_MEMORY_FRACTION = "0.92"

# Sizes of data-centre GPUs in GB (1e9 bytes), for which a dry run finds the largest batch.
CARDS_GB = (80, 140)

# Nobody trains with more images a step; a toy model would let the search go on for ever.
_MAX_BATCH = 65_536


def set_gpu_memory_fraction() -> None:
    """Lets JAX take `GPU_MEMORY_FRACTION`, unless the environment says otherwise.

    Call it before JAX first looks at its devices.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION)


def bytes_needed(compiled) -> int:
    """Bytes of arguments, outputs and temporaries of a compiled program on each device."""
    analysis = compiled.memory_analysis()
    # Donated inputs share their memory with outputs.
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def dry_run(config, num_examples: int) -> None:
    """Compiles the train step for this machine, and prints what it needs and which batches fit.

    Args:
      config: the run's.
      num_examples: images of the data set, for `data.cache = "device"`.
    """
    mesh = sharding.make_mesh(config)
    device = jax.devices()[0].device_kind

    @functools.cache
    def needs(batch):
        tried = config.copy_and_resolve_references()
        tried.train.batch_size = batch
        size = bytes_needed(lower_train_step(tried, mesh, num_examples).compile())
        say(f"batch {batch:6,}: {size / 1e9:7.2f} GB on each {device}")
        return size

    say("dry run: the step is compiled, nothing is trained or written")
    batch = config.train.batch_size
    needs(batch)
    multiple = jax.device_count() * config.optim.accumulate_steps
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION))
    for card_gb in CARDS_GB:
        largest, size = largest_batch(needs, batch, multiple, int(card_gb * 1e9 * fraction))
        if largest:
            found = f"train.batch_size {largest:,} fits ({size / 1e9:.3g} GB on each)"
        else:
            found = f"train.batch_size {multiple} does not fit; type {advice(config)}"
        say(f"devices of {card_gb} GB, of which JAX takes {fraction:.0%}: {found}")


def largest_batch(
    needs: Callable[[int], int], batch: int, multiple: int, limit: int
) -> tuple[int, int]:
    """The largest batch, a multiple of `multiple`, whose step needs at most `limit` bytes.

    Memory grows almost in proportion to the batch, so each guess lies where the line through two
    known batches meets the limit. The result was itself found to fit; a batch that was found not
    to fit is the next one, or at most 3 % larger. The search ends at 65,536.

    Args:
      needs: batch -> bytes.
      batch: where to start; a multiple of `multiple`.
      multiple: devices x accumulation steps.
      limit: bytes.

    Returns:
      (batch, its bytes); (0, bytes of the smallest batch) where not even that fits.
    """
    smallest = needs(multiple)
    if smallest > limit:
        return 0, smallest
    low, low_bytes, high = multiple, smallest, None
    most = max(_MAX_BATCH // multiple, 2) * multiple
    guess = max(batch, 2 * multiple)
    while high is None or (high - low > multiple and high > 1.03 * low):
        guess_bytes = needs(guess)
        slope = max((guess_bytes - smallest) / (guess - multiple), 1)
        if guess_bytes <= limit:
            low, low_bytes = guess, guess_bytes
            if low >= most:
                break
        else:
            high = guess
        guess = multiple * int(1 + (limit - smallest) / slope / multiple)
        # The line may lead to a batch that is known: then the next one, towards the gap.
        guess = min(max(guess, low + multiple), most)
        if high is not None:
            guess = min(guess, high - multiple)
    return low, low_bytes


def advice(config, mode: str = "train", num_devices: int | None = None) -> str:
    """What to type when memory runs out, what costs least speed first.

    Args:
      config: the run's.
      mode: "train" or "sample".
      num_devices: of the machine that is meant; None: this one's.
    """
    num_devices = num_devices or jax.device_count()
    field, batch, multiple = "sample.batch_size", config.sample.batch_size, num_devices
    tries = []
    if mode == "train":
        field, batch = "train.batch_size", config.train.batch_size
        pieces = 2 * config.optim.accumulate_steps
        multiple = num_devices * config.optim.accumulate_steps
        if batch % (2 * multiple) == 0:
            tries.append(
                f"--config.optim.accumulate_steps={pieces} (the same updates, in smaller pieces)"
            )
        if config.model.remat == "none":
            tries.append("--config.model.remat=blocks (a third more compute)")
        if num_devices > config.mesh.fsdp:
            tries.append(f"--config.mesh.fsdp={num_devices} (splits parameters and optimizer)")
        if config.data.cache == "device":
            tries.append("--config.data.cache=host (keeps the images off the device)")
    half = max(batch // 2 // multiple, 1) * multiple
    if half < batch:
        tries.append(f"--config.{field}={half}")
    return ", or ".join(tries) or "a smaller --config.model.size"


@contextlib.contextmanager
def explained(config, mode: str) -> Iterator[None]:
    """Turns the runtime's out-of-memory error into one sentence that says what to type.

    Raises:
      ConfigError: where the block ran out of device memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        batch = config.train.batch_size if mode == "train" else config.sample.batch_size
        reason = str(error).strip().splitlines()[0][:200]
        see = "; --config.train.dry_run=True finds what fits" if mode == "train" else ""
        raise ConfigError(
            f"out of device memory at {mode}.batch_size {batch} on {jax.device_count()} x "
            f"{jax.devices()[0].device_kind} ({reason}); type {advice(config, mode)}{see}"
        ) from error
