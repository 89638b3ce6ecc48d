"""Data movement in kernels for Hopper GPUs (Pallas, Mosaic GPU), used by `hopper_attention`.

A thread block runs several warpgroups. One is the loader: it streams the rows of one head through a
ring in shared memory. The others are workers: each computes one tile of 64 rows at a time against
that stream. If a whole head fits into the ring, one pass serves all its tiles, and the next head is
loaded meanwhile; otherwise each pass serves as many tiles as there are workers. A worker's next
tile is loaded, and its previous results are stored, while it computes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a tile and of a chunk of the stream, for one warpgroup's matmul
TILE_LAYOUT = plgpu.Layout.WGMMA  # of a [ROWS, ROWS] array in a warpgroup's registers

_SHARED_BYTES = 232_448 - 2048  # of a block, less a part for barriers and the compiler
_NUM_BLOCKS = 132  # multiprocessors of an H100 or H200; with fewer, the last blocks wait
# Registers per thread of a worker and of the loader, by number of workers; an SM has 65,536.
_REGISTERS = {2: (240, 24), 3: (160, 24)}


@dataclasses.dataclass(frozen=True)
class Stream:
    """A worker's view of the stream: chunks c = 0, 1, ... of ROWS rows. Use each in this order:
    `wait`, `arrays` and `rows`, then `release` after the last read."""

    wait: Callable
    arrays: Callable  # c -> shared memory [ROWS, H] of each streamed array
    rows: Callable  # c -> float32 [ROWS] of each streamed row array, along the columns of a tile
    release: Callable
    turn: Callable  # float32 [ROWS] along the rows of a tile -> the same along its columns


def compute_tiles(
    tile: Callable,
    *,
    num_heads: int,
    streamed: Sequence[tuple[jax.Array, int]],
    streamed_rows: Sequence[jax.Array] = (),
    num_chunks: int,
    tiled: Sequence[tuple[jax.Array, int]],
    tiled_rows: Sequence[jax.Array] = (),
    head_rows: Sequence[jax.Array] = (),
    output: tuple[jax.Array | jax.ShapeDtypeStruct, int],
    num_outputs: int,
    num_row_outputs: int = 0,
    num_workers: int,
    name: str,
) -> list[jax.Array]:
    """Computes every tile of every head of every image.

    Args:
      tile: (tiles, tile_rows, head_rows, stream) -> (outputs, row outputs). `tiles` are [ROWS, H]
        registers, one for each tiled array, `tile_rows` float32 [ROWS]; rows beyond L are zero.
        `head_rows` are float32 [H], along the columns of a tile. Outputs are [ROWS, H], row outputs
        float32 [ROWS].
      num_heads: K.
      streamed, tiled: (array, i) for heads i, i + 1, ... i + K - 1 of an array [B, L, K or more, H]
        with 16-bit elements and H = 64.
      streamed_rows, tiled_rows: float32 [B, K, L or more].
      num_chunks: chunks of the stream that every tile is computed against.
      head_rows: float32 [B, K, H], the same for all tiles of a head.
      output: (array, i) as in `streamed`, for the outputs: K heads for each, from head i on. A
        given array keeps its other heads, and is overwritten in place if nothing else reads it. For
        a ShapeDtypeStruct a new array is made, whose other heads are arbitrary.
      num_outputs: how many outputs `tile` returns.
      num_row_outputs: how many row outputs `tile` returns, float32 [B, K, L or more]. Beyond L,
        the last used tile holds the results of `tile` for zero rows; the rest is arbitrary.
      num_workers: 2 or 3; with 3, each has fewer registers.
      name: the kernel's name in a profile (not shown by JAX 0.10 if the output array is given).

    Returns:
      The array of the outputs, then the row outputs.

    Raises:
      ValueError: if a head has fewer tiles than there are workers; one would wait forever.
    """
    batch, length, _, head_dim = streamed[0][0].shape
    dtype = streamed[0][0].dtype
    num_tiles = pl.cdiv(length, ROWS)
    if num_tiles < num_workers:
        raise ValueError(f"{length} tokens for {num_workers} workers; expected {ROWS} for each")
    num_rows = len(tiled_rows) + len(head_rows) + 1
    num_slots = _num_slots(
        num_chunks,
        own=num_workers * _bytes(len(tiled) + num_outputs, num_rows, head_dim, dtype),
        slot=_bytes(len(streamed), len(streamed_rows), head_dim, dtype),
    )
    pass_tiles = num_tiles if num_slots >= num_chunks else num_workers
    num_passes = pl.cdiv(num_tiles, pass_tiles)
    plan = _Plan(num_heads, length, num_chunks, num_tiles, pass_tiles, num_passes, batch)
    stacked = [jnp.stack(head_rows, axis=2)] if head_rows else []  # to be copied at once
    given = _Inputs(streamed, streamed_rows, tiled, tiled_rows, stacked)
    counts = [len(group) for group in given]

    def heads(ref, first):
        return ref.at[:, :, pl.ds(first, num_heads)]

    def views(group, refs):
        return [heads(ref, first) for ref, (_, first) in zip(refs, group, strict=True)]

    def kernel(*refs):
        groups, (output_ref, *rest) = _split(refs, counts)
        arrays = _Inputs(*groups)
        arrays = arrays._replace(
            streamed=views(streamed, arrays.streamed), tiled=views(tiled, arrays.tiled)
        )
        parts = [heads(output_ref, output[1] + i * num_heads) for i in range(num_outputs)]
        row_outputs, scratch = rest[:num_row_outputs], rest[num_row_outputs:]
        # Row outputs are written from registers and need no shared memory.
        groups, rest = _split(scratch, counts)
        own_outputs, (turned, ready, free, arrived) = rest[:num_outputs], rest[num_outputs:]
        shared = _Inputs(*groups)
        worker = lax.axis_index("warpgroup")

        @pl.when(worker == num_workers)
        def _():
            plgpu.set_max_registers(_REGISTERS[num_workers][1], action="decrease")
            _load(plan, num_slots, arrays, shared, ready, free)

        @pl.when(worker < num_workers)
        def _():
            plgpu.set_max_registers(_REGISTERS[num_workers][0], action="increase")
            turn = functools.partial(_turn, turned, worker)
            ring = functools.partial(_stream, num_slots, shared, ready, free, turn)
            outputs = (parts, row_outputs, own_outputs)
            _work(plan, tile, worker, num_workers, ring, arrays, shared, outputs, arrived)

    block = functools.partial(_shared_array, head_dim=head_dim, dtype=dtype)
    scratch = [
        *[block(num_slots)] * len(streamed),
        *[plgpu.SMEM((num_slots, ROWS), jnp.float32)] * len(streamed_rows),
        *[block(num_workers)] * len(tiled),
        *[plgpu.SMEM((num_workers, ROWS), jnp.float32)] * len(tiled_rows),
        *[plgpu.SMEM((num_workers, len(head_rows), head_dim), jnp.float32)] * len(stacked),
        *[block(num_workers)] * num_outputs,
        plgpu.SMEM((num_workers, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=num_slots, num_arrivals=counts[0] + counts[1]),
        plgpu.Barrier(num_barriers=num_slots, num_arrivals=num_workers),
        plgpu.Barrier(num_barriers=num_workers, num_arrivals=sum(counts[2:])),
    ]
    array, _ = output
    is_given = not isinstance(array, jax.ShapeDtypeStruct)
    row_shape = (batch, num_heads, plan.num_passes * pass_tiles * ROWS)
    row_types = [jax.ShapeDtypeStruct(row_shape, jnp.float32)] * num_row_outputs
    # `plgpu.kernel` would be shorter, but does not take references in JAX 0.10.
    run = pl.kernel(
        lambda *refs: pl.run_scoped(
            functools.partial(kernel, *refs), *scratch, collective_axes="warpgroup"
        ),
        out_type=row_types if is_given else [array, *row_types],
        mesh=plgpu.Mesh(
            grid=(min(plan.num_units, _NUM_BLOCKS),),
            grid_names=("block",),
            num_threads=num_workers + 1,
            thread_name="warpgroup",
        ),
        name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # all workers would share it; see `_turn`
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,  # not the default in JAX 0.10
        ),
    )
    operands = [
        *[x for x, _ in streamed],
        *streamed_rows,
        *[x for x, _ in tiled],
        *tiled_rows,
        *stacked,
    ]
    if not is_given:
        return run(*operands)
    ref = jax.new_ref(array)
    row_outputs = run(*operands, ref)
    return [jax.freeze(ref), *row_outputs]


class _Inputs(NamedTuple):
    """The inputs of `compute_tiles`: the arguments, their references, or their shared memory."""

    streamed: Sequence
    streamed_rows: Sequence
    tiled: Sequence
    tiled_rows: Sequence
    head_rows: Sequence  # stacked, in one array or none


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The assignment of work to blocks. A unit is one pass over the stream of one head."""

    num_heads: int
    length: int  # L
    num_chunks: int
    num_tiles: int
    pass_tiles: int  # computed in one pass
    num_passes: int  # over each head
    batch: int

    @property
    def num_units(self):
        return self.batch * self.num_heads * self.num_passes

    def num_own_units(self):
        """The block takes every num_blocks-th unit, so neighbouring blocks read the same images."""
        blocks = min(self.num_units, _NUM_BLOCKS)
        return lax.div(self.num_units - 1 - lax.axis_index("block"), blocks) + 1

    def place(self, n):
        """(image, head, first tile) of this block's unit n."""
        unit = lax.axis_index("block") + n * min(self.num_units, _NUM_BLOCKS)
        head = lax.div(unit, self.num_passes)
        first_tile = lax.rem(unit, self.num_passes) * self.pass_tiles
        return lax.div(head, self.num_heads), lax.rem(head, self.num_heads), first_tile


def _load(plan, num_slots, arrays, shared, ready, free):
    """The loader: copies chunk after chunk into the ring, each as soon as its slot is free."""
    num_loads = plan.num_own_units() * plan.num_chunks

    @pl.loop(0, num_loads + num_slots)  # the last num_slots turns wait until all slots are free
    def _(i):
        slot = lax.rem(i, num_slots)

        @pl.when(i >= num_slots)
        def _():
            plgpu.barrier_wait(free.at[slot])

        @pl.when(i < num_loads)
        def _():
            image, head, _ = plan.place(lax.div(i, plan.num_chunks))
            rows = pl.ds(lax.rem(i, plan.num_chunks) * ROWS, ROWS)
            where = (image, head, rows)
            _copy_blocks(arrays.streamed, shared.streamed, where, slot, ready.at[slot])
            _copy_rows(arrays.streamed_rows, shared.streamed_rows, where, slot, ready.at[slot])


def _stream(num_slots, shared, ready, free, turn, first_chunk, enters, leaves) -> Stream:
    """A worker's view of one pass, whose chunk 0 is the block's chunk `first_chunk`.

    All of a worker's tiles in one pass read the same chunks. The worker waits for them at its first
    tile (`enters`) and frees them at its last (`leaves`).
    """

    def slot(c):
        return lax.rem(first_chunk + c, num_slots)

    def wait(c):
        @pl.when(enters)
        def _():
            plgpu.barrier_wait(ready.at[slot(c)])

    def release(c):
        @pl.when(leaves)
        def _():
            plgpu.barrier_arrive(free.at[slot(c)])

    def rows(c):
        return [plgpu.layout_cast(x[slot(c)], TILE_LAYOUT.reduce(0)) for x in shared.streamed_rows]

    def arrays(c):
        return [_tiled(x).at[slot(c)] for x in shared.streamed]

    return Stream(wait, arrays, rows, release, turn)


def _turn(turned, worker, x):
    """`Stream.turn`: lets all warps of a worker reduce over all its rows.

    A warp holds some rows and all columns. JAX's own reduction over rows uses scratch memory that
    all workers would share.
    """
    turned[worker] = x
    plgpu.commit_smem()
    return plgpu.layout_cast(turned[worker], TILE_LAYOUT.reduce(0))


def _work(plan, tile, worker, num_workers, ring, arrays, shared, outputs, arrived):
    """One worker: computes tiles `worker`, `worker` + num_workers, ... of its block's."""
    parts, row_outputs, own_outputs = outputs
    num_tiles = plan.num_own_units() * plan.pass_tiles

    def locate(t):
        unit = lax.div(t, plan.pass_tiles)
        image, head, first_tile = plan.place(unit)
        return unit, image, head, (first_tile + lax.rem(t, plan.pass_tiles)) * ROWS

    def fetch(i):
        _, image, head, first_row = locate(worker + i * num_workers)
        where, barrier = (image, head, pl.ds(first_row, ROWS)), arrived.at[worker]
        _copy_blocks(arrays.tiled, shared.tiled, where, worker, barrier)
        _copy_rows(arrays.tiled_rows, shared.tiled_rows, where, worker, barrier)
        for ref, own in zip(arrays.head_rows, shared.head_rows, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[image, head], own.at[worker], barrier)

    fetch(0)

    @pl.loop(0, lax.div(num_tiles - 1 - worker, num_workers) + 1)
    def _(i):
        t = worker + i * num_workers
        unit, image, head, first_row = locate(t)
        rows = pl.ds(first_row, ROWS)
        plgpu.barrier_wait(arrived.at[worker])
        tiles = [plgpu.layout_cast(_tiled(x)[worker], TILE_LAYOUT) for x in shared.tiled]
        down, across = TILE_LAYOUT.reduce(1), TILE_LAYOUT.reduce(0)
        tile_rows = [plgpu.layout_cast(x[worker], down) for x in shared.tiled_rows]
        head_rows = [
            plgpu.layout_cast(x[worker, n], across)
            for x in shared.head_rows
            for n in range(x.shape[1])
        ]

        @pl.when(t + num_workers < num_tiles)
        def _():
            fetch(i + 1)

        stream = ring(
            unit * plan.num_chunks,
            enters=(t < num_workers) | (lax.div(t - num_workers, plan.pass_tiles) != unit),
            leaves=lax.div(t + num_workers, plan.pass_tiles) != unit,
        )

        @pl.when(first_row < plan.length)
        def _():
            values, row_values = tile(tiles, tile_rows, head_rows, stream)
            for ref, value in zip(row_outputs, row_values, strict=True):
                ref[image, head, rows] = value
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until the previous tile is copied out
            for own, ref, value in zip(own_outputs, parts, values, strict=True):
                _tiled(own)[worker] = value.astype(ref.dtype)
            plgpu.commit_smem()
            for own, ref in zip(own_outputs, parts, strict=True):
                plgpu.copy_smem_to_gmem(_plain(own).at[worker], ref.at[image, rows, head])

        if plan.num_passes * plan.pass_tiles > plan.num_tiles:  # the last pass is not full

            @pl.when(first_row >= plan.length)
            def _():
                @pl.loop(0, plan.num_chunks)
                def _(c):
                    stream.wait(c)
                    stream.release(c)

    plgpu.wait_smem_to_gmem(0)


def _copy_blocks(refs, shared, where, slot, barrier):
    """Starts the copy of the block of each array at (image, head, rows) into shared memory."""
    image, head, rows = where
    for ref, own in zip(refs, shared, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[image, rows, head], _plain(own).at[slot], barrier)


def _copy_rows(refs, shared, where, slot, barrier):
    """The same for row arrays."""
    image, head, rows = where
    for ref, own in zip(refs, shared, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[image, head, rows], own.at[slot], barrier)


def _num_slots(num_chunks, own, slot):
    """The number of slots in the ring; more than two heads' chunks would bring nothing."""
    return min((_SHARED_BYTES - own) // slot, 2 * num_chunks)


def _bytes(num_blocks, num_rows, head_dim, dtype):
    return ROWS * (num_blocks * head_dim * jnp.dtype(dtype).itemsize + num_rows * 4)


def _shared_array(count, head_dim, dtype):
    """Blocks of shared memory, in rows of 128 bytes, swizzled against bank conflicts.

    They have two views of the same bytes. Tensor cores read tiles of 8 rows; in that view, a copy
    would have to be whole tiles. In tiles of one row it can have any length, and the order of the
    bytes is the same, as a row of a tile is a row of the block. JAX does not promise that views of
    a `RefUnion` start at the same byte; they do, and the tests on a GPU would fail otherwise.
    """
    swizzle = plgpu.SwizzleTransform(128)
    shape = (count, ROWS, head_dim)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((1, 64)), swizzle)),
        plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), swizzle)),
    )


def _plain(blocks):
    return blocks[0]


def _tiled(blocks):
    return blocks[1]


def _split(refs, counts):
    """(groups, rest): consecutive groups of `refs` with the sizes `counts`, and what remains."""
    groups, start = [], 0
    for count in counts:
        groups.append(refs[start : start + count])
        start += count
    return groups, refs[start:]
