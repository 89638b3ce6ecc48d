"""`--config.train.dry_run=True`: memory of the train step on each device, and the batches that fit.

Each phase of a run has its own step and batch, so each has its own figures.

The figures are the compiler's own analysis of the program; nothing is run or written.
"""

import functools
import os
from collections.abc import Callable

import jax

from maskdm_jax import phases, sharding
from maskdm_jax.model.sizes import batch_multiple
from maskdm_jax.run.memory import GPU_MEMORY_FRACTION, advice, bytes_needed
from maskdm_jax.run.progress import say
from maskdm_jax.step import lower_train_step

# Memory of data-centre GPUs in GB (1e9 bytes); a dry run finds the largest batch for each.
CARDS_GB = (80, 140)

# No one trains with more images per step; the search for a toy model would not end.
_MAX_BATCH = 65_536


def dry_run(config, num_examples: int) -> None:
    """Compiles each phase's step for this machine; prints its memory and the batches that fit.

    Args:
      config: the run's.
      num_examples: images of the data set, for `data.cache = "device"`.
    """
    say("dry run: the step is compiled, nothing is trained or written")
    for phase in phases.phases(config):
        if config.phases:
            say(f"phase {phase.index + 1}, steps {phase.first_step + 1} to {phase.last_step}")
        _dry_run(phase, num_examples)


def _dry_run(phase, num_examples):
    config = phase.config
    mesh = sharding.make_mesh(config)
    device = jax.devices()[0].device_kind

    @functools.cache
    def needs(batch):
        tried = config.copy_and_resolve_references()
        tried.train.batch_size = batch
        size = bytes_needed(
            lower_train_step(phase._replace(config=tried), mesh, num_examples).compile()
        )
        say(f"batch {batch:6,}: {size / 1e9:7.2f} GB on each {device}")
        return size

    batch = config.train.batch_size
    needs(batch)
    multiple = batch_multiple(config, jax.device_count())
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION))
    for card_gb in CARDS_GB:
        largest, size = largest_batch(needs, batch, multiple, int(card_gb * 1e9 * fraction))
        if largest:
            # The search may end before the memory does.
            bound = ", the largest that is tried," if largest + multiple > _MAX_BATCH else ""
            found = f"train.batch_size {largest:,}{bound} fits ({size / 1e9:.3g} GB on each)"
        else:
            found = f"train.batch_size {multiple} does not fit; type {advice(config)}"
        say(f"devices of {card_gb} GB, of which JAX takes {fraction:.0%}: {found}")


def largest_batch(
    needs: Callable[[int], int], batch: int, multiple: int, limit: int
) -> tuple[int, int]:
    """The largest batch, a multiple of `multiple`, whose step needs at most `limit` bytes.

    Memory grows almost linearly with the batch, so each guess is where the line through two known
    batches meets the limit. The result has itself been compiled and fits; the smallest batch known
    not to fit is the next multiple, or at most 3 % larger. The search ends at 65,536.

    Args:
      needs: batch -> bytes.
      batch: where to start; a multiple of `multiple`.
      multiple: of `sizes.batch_multiple`.
      limit: bytes.

    Returns:
      (batch, its bytes); (0, bytes of the smallest batch) if not even that fits.
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
        # The line may meet a batch already tried; then try the next one inside the gap.
        guess = min(max(guess, low + multiple), most)
        if high is not None:
            guess = min(guess, high - multiple)
    return low, low_bytes
