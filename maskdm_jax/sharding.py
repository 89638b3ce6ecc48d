"""The device mesh (data, fsdp) and what lies where on it.

A batch is split over both axes. Parameters, EMA and optimizer state are split over fsdp by the
first rule whose pattern their path matches; what a rule cannot divide evenly is kept whole.
"""

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Kernels are [in, out]. Splitting the wide side keeps every shard's matmul large.
_RULES = (
    (r"(qkv|mlp_in|time_mlp_in|patch_embed)/kernel$", PartitionSpec(None, "fsdp")),
    (r"(proj|mlp_out|skip|time_mlp_out|output)/kernel$", PartitionSpec("fsdp", None)),
    (r"(position|embedding)$", PartitionSpec(None, "fsdp")),
)

# XLA's options, by backend. Triton's matmuls never beat cuBLAS's at this network's shapes, and
# trying them out doubles the time to compile (benchmarks/RESULTS.md).
_COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def make_mesh(config) -> Mesh:
    """The mesh of `config.mesh` over all devices."""
    devices = np.asarray(jax.devices())
    return Mesh(devices.reshape(-1, config.mesh.fsdp), ("data", "fsdp"))


def compiler_options(mesh: Mesh) -> dict:
    """XLA's options for programs on `mesh`, for `jax.jit`."""
    return _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


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
