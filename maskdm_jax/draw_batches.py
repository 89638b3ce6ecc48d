"""Drawing many images, a batch at a time, while a person sees how far it is."""

import collections
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from maskdm_jax import draw, sharding
from maskdm_jax.diffusion import samplers
from maskdm_jax.model import patches
from maskdm_jax.model.sizes import grid_shape
from maskdm_jax.run import progress

# Stretches that the devices have in advance, a batch or more; at most 32 may be in flight.
_AHEAD = 20


def in_batches(
    jitted, params, ids: Sequence[int], size: int, sharding: NamedSharding
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Draws the images with the numbers `ids`, and gathers them on every process.

    Args:
      jitted: `draw.jit_draw`, with outputs of `sharding`.
      params: the network's.
      ids: image numbers.
      size: images at a time; the last batch is padded, since one shape is compiled.
      sharding: of a batch.

    Yields:
      (some of `ids`, their uint8 images [B, H, W, C]). The devices draw the next batch meanwhile.
    """
    return _in_batches(lambda index_B: [(1, jitted(params, index_B))], 1, ids, size, sharding)


class Drawing:
    """Draws batches in stretches of the walk's rows, so that a person sees a long one advance.

    The devices get several stretches at once, so that they never wait, and the images are those of
    `draw.jit_draw`.
    """

    def __init__(
        self,
        config,
        mesh: Mesh,
        steps: int | None = None,
        given: dict | None = None,
        num: int | None = None,
    ):
        """
        Args:
          config, mesh, steps: as for `draw.make_draw`.
          given: NumPy arrays that its result takes to start from images; None: from noise.
          num: of images wanted, which may be fewer than a batch has.
        """
        self.batch_size = draw.batch_size(config, mesh, num)
        self._num_rows = draw.num_rows(config, steps, from_image=bool(given))
        self._sharding, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._given = {
            name: jax.make_array_from_callback(x.shape, whole, x.__getitem__)
            for name, x in (given or {}).items()
        }
        self._length = stretch_length(self._num_rows)
        self._advance = _jit_stretch(config, mesh, steps, self._length)
        self._join = jax.jit(
            lambda x_BNP: patches.join(x_BNP, config.model.patch_size, config.data.image_size),
            out_shardings=self._sharding,
        )
        rows, columns = grid_shape(config.data.image_size, config.model.patch_size)
        patch_dim = patches.patch_dim(config.model.patch_size, config.data.channels)
        self._shape, self._sampler = (rows * columns, patch_dim), config.sample.sampler
        self._carry = None

    def in_batches(
        self,
        params,
        ids: Sequence[int],
        shown: progress.Progress | None = None,
    ) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """As the function of this name, `batch_size` at a time; `shown`, if given, counts them."""
        stretches, size = functools.partial(self.stretches, params), self.batch_size
        return _in_batches(stretches, self._num_rows, ids, size, self._sharding, shown)

    def stretches(self, params, index_B: jax.Array) -> Iterator[tuple[int, jax.Array]]:
        """Begins a batch, stretch after stretch.

        Yields:
          (rows done, an array that is there once they are); the last are the images [B, H, W, C].
        """
        if self._carry is None or len(self._carry.x_t) != len(index_B):
            self._carry = self._empty_carry(len(index_B))
        for first in range(0, self._num_rows, self._length):
            self._carry, done = self._advance(
                params, index_B, self._carry, np.int32(first), self._given
            )
            last = first + self._length
            yield last, done if last < self._num_rows else self._join(self._carry.x_t)

    def _empty_carry(self, batch):
        def zeros():
            return samplers.empty_carry(jnp.zeros((batch, *self._shape)), self._sampler)

        return jax.jit(zeros, out_shardings=self._sharding)()


def stretch_length(num_rows: int) -> int:
    """The rows of a stretch: they divide all, into 5 to 20 stretches where that is possible."""
    divisors = [n for n in range(1, max(num_rows // 5, 1) + 1) if num_rows % n == 0]
    return next((n for n in divisors if 20 * n >= num_rows), divisors[-1])


def _jit_stretch(config, mesh, steps, length):
    """(params, index_B, carry, first, given) -> (carry, rows done)."""
    by_batch, jittable = sharding.batch_sharding(mesh), draw.make_draw(config, mesh, steps)

    def advance(params, index_B, carry, first, given):
        stretch = samplers.Stretch(carry, first, length)
        return jittable(params, index_B, stretch=stretch, **given), first + length

    return jax.jit(
        advance,
        out_shardings=(by_batch, sharding.replicated(mesh)),
        donate_argnums=2,
        compiler_options=sharding.compiler_options(mesh),
    )


def _in_batches(stretches, num_rows, ids, size, sharding, shown=None):
    """`in_batches` for index_B -> (rows done, images) of each stretch."""

    def begun():
        for first in range(0, len(ids), size):
            batch = ids[first : first + size]
            index_B = np.asarray([*batch, *[batch[-1]] * (size - len(batch))], np.int32)
            index_B = jax.make_array_from_callback((size,), sharding, index_B.__getitem__)
            for row, drawn in stretches(index_B):
                yield first, batch, row, drawn

    def finished(first, batch, row, drawn):
        if row < num_rows:
            jax.block_until_ready(drawn)
            if shown is not None:
                shown.at(first, f"step {row}/{num_rows}", row / num_rows * len(batch))
            return
        gathered = multihost_utils.process_allgather(drawn, tiled=True)
        yield batch, np.asarray(gathered)[: len(batch)]
        if shown is not None:
            shown.at(first + len(batch))

    ahead = collections.deque()  # for the devices, while this process waits or saves images
    for stretch in begun():
        ahead.append(stretch)
        while len(ahead) > _AHEAD or sum(row == num_rows for _, _, row, _ in ahead) > 1:
            yield from finished(*ahead.popleft())
    for stretch in ahead:
        yield from finished(*stretch)
