"""The device mesh (data, fsdp) and the placement of arrays on it.

A batch is split over both axes. Parameters, EMA and optimizer state are split over fsdp by the
first rule whose pattern matches their path; an array that no rule divides evenly is replicated.
"""

import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Kernels are [in, out]. Splitting the wide side keeps every shard's matmul large.
_RULES = (
    (r"(qkv|mlp_in|time_mlp_in|patch_embed)/kernel$", PartitionSpec(None, "fsdp")),
    (r"(proj|mlp_out|skip|time_mlp_out|output)/kernel$", PartitionSpec("fsdp", None)),
    (r"(position|embedding)$", PartitionSpec(None, "fsdp")),
    (r"qkv/kernel$", PartitionSpec(None, None, "fsdp")),  # Muon's momentum, [in, 3, out]
)

# XLA's options, by backend (benchmarks/RESULTS.md has the gains). Triton's matmuls never beat
# cuBLAS's at this network's shapes, and autotuning them doubles the compile time. Merging small
# matmuls that share a factor makes them no faster, and splitting the result costs copies.
_COMPILER_OPTIONS = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
}


def make_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over `devices`; None for all devices."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(devices.reshape(-1, config.mesh.fsdp), ("data", "fsdp"))


def first_device(mesh: Mesh | None) -> jax.Device:
    """The first device of `mesh`, whose devices are all alike; JAX's first if `mesh` is None."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def compiler_options(mesh: Mesh) -> dict:
    """The `compiler_options` of `jax.jit` for programs on `mesh`."""
    return _COMPILER_OPTIONS.get(first_device(mesh).platform, {})


def compute_capability(device: jax.Device) -> float | None:
    """That of an NVIDIA GPU, such as 7.5 for a T4; None for any other device."""
    found = getattr(device, "compute_capability", None)  # AMD's are names such as gfx90a
    is_nvidia = device.platform == "gpu" and re.fullmatch(r"\d+\.\d+", str(found))
    return float(found) if is_nvidia else None


def unfit_for_gpu_kernels(device: jax.Device) -> str:
    """Why kernels for NVIDIA GPUs since Ampere cannot run on `device`; "" if they can."""
    capability = compute_capability(device)
    if capability is None:
        return f"the device is {device.device_kind}, not an NVIDIA GPU"
    return f"{device.device_kind} is older than Ampere" if capability < 8.0 else ""


def bfloat16_advice(device: jax.Device, dtype: str) -> str:
    """Why `device` gains nothing from `model.dtype` bfloat16; "" if it does, or for float32."""
    if dtype != "bfloat16" or (compute_capability(device) or 8.0) >= 8.0:
        return ""
    return f"{device.device_kind} has no bfloat16 arithmetic: XLA converts to float32 and back"


def on_each_device(
    kernel: Callable, mesh: Mesh | None, num_rows: int, num_whole: int = 0
) -> Callable:
    """`kernel` over the mesh: each device computes its own rows.

    XLA cannot partition a custom kernel by itself.

    Args:
      kernel: a function of arrays [num_rows, ...], followed by `num_whole` replicated arrays.
      mesh: None for one device.
      num_rows: leading size; if the devices do not divide it, as in a preview, each device computes
        all rows.
      num_whole: the number of replicated arrays.
    """
    if mesh is None or mesh.size == 1:
        return kernel
    rows = PartitionSpec(mesh.axis_names) if num_rows % mesh.size == 0 else PartitionSpec()

    def run(*arrays):
        specs = (rows,) * (len(arrays) - num_whole) + (PartitionSpec(),) * num_whole
        # A kernel's outputs do not declare which mesh axes they vary over, so JAX cannot check it.
        shards = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return shards(*arrays)

    return run


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows(sharding: NamedSharding, size: int) -> np.ndarray:
    """Ids of the rows of a batch of `size` that this process's devices hold, ascending, [n]."""
    rows = np.arange(size)
    parts = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([rows[part] for part in parts]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state, mesh: Mesh):
    """A NamedSharding for each leaf of a state, or of any tree with the same leaf names."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in _RULES:
            if re.search(pattern, name) and _divides(leaf.shape, spec, mesh):
                return NamedSharding(mesh, spec)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def abstract(make, mesh: Mesh):
    """Shapes, dtypes and shardings on `mesh` of `make()`'s result; nothing is computed."""
    shapes = jax.eval_shape(make)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        state_shardings(shapes, mesh),
    )


def _divides(shape, spec, mesh):
    return len(shape) == len(spec) and all(
        axis is None or size % mesh.shape[axis] == 0 for size, axis in zip(shape, spec, strict=True)
    )
