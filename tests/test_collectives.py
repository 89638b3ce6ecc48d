import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from launch import collectives

_SHARD = 16 * 4 * 4  # bytes of a device's float32 [16, 4]


@pytest.fixture(scope="module")
def hlo():
    """HLO of a program with collectives of four kinds, one in a loop too, on 8 devices."""

    def program(x):
        total = jax.lax.psum(x, "data")
        whole = jax.lax.all_gather(x, "data", tiled=True)
        part = jax.lax.psum_scatter(whole * 2, "data", tiled=True)
        moved = jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])
        looped, _ = jax.lax.scan(lambda c, _: (jax.lax.psum(jnp.sin(c), "data"), None), x, length=5)
        return total, whole, part, moved, looped

    spec = PartitionSpec("data")
    shards = jax.shard_map(
        program,
        mesh=Mesh(np.asarray(jax.devices()), ("data",)),
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    return jax.jit(shards).lower(jax.ShapeDtypeStruct((8 * 16, 4), jnp.float32)).compile().as_text()


def test_sizes_are_of_the_whole_array_and_a_loop_counts_once_per_iteration(hlo):
    expected = {
        "all-gather": 8 * _SHARD,
        "reduce-scatter": 8 * _SHARD,
        "collective-permute": _SHARD,
    }
    assert collectives.sizes(hlo) == expected | {"all-reduce": 2 * _SHARD}
    assert collectives.sizes(hlo, loops=5) == expected | {"all-reduce": 6 * _SHARD}


def test_a_chain_counts_once_and_an_all_reduce_scatter_as_a_reduce_scatter():
    hlo = """HloModule tpu

%all-reduce-scatter.1 (input: f32[8,128]) -> f32[2,128] {
  %sum.1 = f32[8,128]{1,0:T(8,128)S(1)} all-reduce(%input), channel_id=4, to_apply=%add
}

ENTRY %main (x: bf16[2,128]) -> bf16[8,128] {
  %g.1 = bf16[8,128]{1,0} all-gather(%x), channel_id=3, frontend_attributes={chain_id="1"}
  %g.2 = bf16[8,128]{1,0} all-gather(%y), channel_id=3, frontend_attributes={chain_id="1"}
  %s.1 = (bf16[2,128]{1,0}, bf16[8,128]{1,0}) all-gather-start(%x), channel_id=5
  %f = f32[2,128]{1,0} fusion(%z), calls=%all-reduce-scatter.1
}
"""
    assert collectives.sizes(hlo) == {"reduce-scatter": 4096, "all-gather": 2 * 2048}


def test_an_all_reduce_crosses_the_links_twice():
    assert collectives.traffic({"all-reduce": 10, "all-gather": 5}) == 25
