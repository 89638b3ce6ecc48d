"""The device mesh (data, fsdp) and what lies where on it.

A batch is split over both axes. Parameters, EMA and optimizer state are split over fsdp by the
first rule whose pattern their path matches; what a rule cannot divide evenly is kept whole.
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
)

# XLA's options, by backend (benchmarks/RESULTS.md has what they bring). Triton's matmuls never beat
# cuBLAS's at this network's shapes, and trying them out doubles the time to compile. Merged, small
# matmuls that share a factor are no faster than apart, and copies cut their results.
_COMPILER_OPTIONS = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
}


def make_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over `devices`; None: all that there are."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(devices.reshape(-1, config.mesh.fsdp), ("data", "fsdp"))


def first_device(mesh: Mesh | None) -> jax.Device:
    """A device of `mesh`, which are all alike; None: this process's first."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def compiler_options(mesh: Mesh) -> dict:
    """XLA's options for programs on `mesh`, for `jax.jit`."""
    return _COMPILER_OPTIONS.get(first_device(mesh).platform, {})


def unfit_for_gpu_kernels(device: jax.Device) -> str:
    """Why kernels for NVIDIA GPUs since Ampere cannot run on `device`; "" where they can."""
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return f"the device is {device.device_kind}, not an NVIDIA GPU"
    if float(device.compute_capability) < 8.0:
        return f"{device.device_kind} is older than Ampere"
    return ""


def on_each_device(
    kernel: Callable, mesh: Mesh | None, num_rows: int, num_whole: int = 0
) -> Callable:
    """`kernel`, a function of arrays, where each device of the mesh computes its own rows.

    XLA cannot split a kernel that it did not write.

    Args:
      kernel: of arrays [num_rows, ...], and after them `num_whole` that every device has whole.
      mesh: None is one device.
      num_rows: where the devices do not divide it, as in a preview, each computes all rows.
      num_whole: see `kernel`.
    """
    if mesh is None or mesh.size == 1:
        return kernel
    rows = PartitionSpec(mesh.axis_names) if num_rows % mesh.size == 0 else PartitionSpec()

    def run(*arrays):
        specs = (rows,) * (len(arrays) - num_whole) + (PartitionSpec(),) * num_whole
        # What a kernel returns does not say over which axes it varies, so that is not checked.
        shards = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return shards(*arrays)

    return run


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows(sharding: NamedSharding, size: int) -> np.ndarray:
    """Ids of the rows, of `size` in a batch, that lie on this process's devices, ascending."""
    rows = np.arange(size)
    parts = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([rows[part] for part in parts]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
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
    """The shapes, dtypes and shardings on `mesh` of what `make()` returns; nothing is computed."""
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
