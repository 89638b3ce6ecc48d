"""Device memory: how much JAX takes, what a program needs, and what to type when it runs out."""

import contextlib
import os
from collections.abc import Iterator

import jax

from maskdm_jax.errors import ConfigError
from maskdm_jax.model.sizes import batch_multiple

# The share of a GPU's memory that JAX takes at start; cuDNN and NCCL need the rest as workspace.
GPU_MEMORY_FRACTION = "0.92"


def set_gpu_memory_fraction() -> None:
    """Lets JAX take `GPU_MEMORY_FRACTION`, unless the environment sets another fraction.

    Call it before JAX touches a device.
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


def described(compiled) -> str:
    """Memory that a compiled program needs on each device, and what there is, in words."""
    needed = f"{bytes_needed(compiled) / 2**30:.2f} GiB on each device"
    # None for a CPU, whose programs have the machine's memory.
    stats = jax.local_devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return f"{needed}, of {limit / 2**30:.2f} GiB that JAX may take"
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{needed}; the machine has {machine / 2**30:.2f} GiB"


def advice(config, mode: str = "train", num_devices: int | None = None) -> str:
    """What to type when memory runs out; the flags that cost least speed come first.

    Args:
      config: the run's.
      mode: "train" or "sample".
      num_devices: devices of the machine in question; None: of this one.
    """
    num_devices = num_devices or jax.device_count()
    field, batch, multiple = "sample.batch_size", config.sample.batch_size, num_devices
    tries = []
    if mode == "train":
        field, batch = "train.batch_size", config.train.batch_size
        pieces = 2 * config.optim.accumulate_steps
        multiple = batch_multiple(config, num_devices)
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
    """Turns the runtime's out-of-memory error into one sentence with what to type.

    Raises:
      ConfigError: if the block runs out of device memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        part = "train" if mode == "train" else "sample"
        batch = config[part].batch_size
        reason = str(error).strip().splitlines()[0][:200]
        if mode == "train" and config.phases:
            raise ConfigError(
                f"out of device memory in one of the phases on {jax.device_count()} x "
                f"{jax.devices()[0].device_kind} ({reason}); type --config.train.dry_run=True, "
                "which finds the train.batch_size that fits each phase"
            ) from error
        see = "; --config.train.dry_run=True finds what fits" if mode == "train" else ""
        raise ConfigError(
            f"out of device memory at {part}.batch_size {batch} on {jax.device_count()} x "
            f"{jax.devices()[0].device_kind} ({reason}); type {advice(config, mode)}{see}"
        ) from error
