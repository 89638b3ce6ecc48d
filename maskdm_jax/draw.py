"""Drawing: from parameters and image numbers to pixels.

Image i depends on (seed, i) alone, since its noise comes from its own key. Image i is therefore the
same for any batch size and number of devices.
"""

import collections
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from maskdm_jax import rng, sharding
from maskdm_jax.diffusion import make_process, samplers
from maskdm_jax.model import patches, uvit
from maskdm_jax.model.sizes import grid_shape
from maskdm_jax.run import progress

# Stretches that the devices have in advance, a batch or more; at most 32 may be in flight.
_AHEAD = 20


def jit_draw(config, mesh: Mesh, out_sharding: NamedSharding, steps: int | None = None):
    """`make_draw` under jit on `mesh`; the images have `out_sharding`."""
    return jax.jit(
        make_draw(config, mesh, steps),
        out_shardings=out_sharding,
        compiler_options=sharding.compiler_options(mesh),
    )


def lower_draw(config, mesh: Mesh, steps: int | None = None):
    """`jit_draw` for one batch of `sample.batch_size` images, lowered from shapes alone."""
    by_batch = sharding.batch_sharding(mesh)
    index_B = jax.ShapeDtypeStruct((config.sample.batch_size,), np.int32, sharding=by_batch)
    return jit_draw(config, mesh, by_batch, steps).lower(abstract_params(config, mesh), index_B)


def abstract_params(config, mesh: Mesh):
    """Shapes, dtypes and shardings on `mesh` of the network's parameters."""
    model = uvit.make_model(config, mesh)
    return sharding.abstract(lambda: uvit.init_params(model, jax.random.key(0)), mesh)


def in_batches(
    jitted, params, ids: Sequence[int], size: int, sharding: NamedSharding
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Draws the images with the numbers `ids`, and gathers them on every process.

    Args:
      jitted: `jit_draw`, with outputs of `sharding`.
      params: the network's.
      ids: image numbers.
      size: images at a time; the last batch is padded, since one shape is compiled.
      sharding: of a batch.

    Yields:
      (some of `ids`, their uint8 images [B, H, W, C]). The devices draw the next batch meanwhile.
    """
    return _in_batches(lambda index_B: [(1, jitted(params, index_B))], 1, ids, size, sharding)


class Drawing:
    """Draws batches in stretches of the sampler's steps, so that a person sees a long one advance.

    The devices get several stretches at once, so that they never wait, and the images are those of
    `jit_draw`.
    """

    def __init__(self, config, mesh: Mesh, steps: int | None = None):
        """Args: as for `make_draw`."""
        self.num_steps = steps or config.sample.steps
        self._sharding = sharding.batch_sharding(mesh)
        self._length = stretch_length(self.num_steps)
        self._advance = _jit_stretch(config, mesh, self.num_steps)
        self._join = jax.jit(
            lambda x_BNP: patches.join(x_BNP, config.model.patch_size, config.data.image_size),
            out_shardings=self._sharding,
        )
        rows, columns = grid_shape(config.data.image_size, config.model.patch_size)
        patch_dim = patches.patch_dim(config.model.patch_size, config.data.channels)
        self._x_shape, self._x = (rows * columns, patch_dim), None

    def in_batches(
        self,
        params,
        ids: Sequence[int],
        size: int,
        shown: progress.Progress | None = None,
    ) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """As the function of this name, but `shown`, if given, counts the images of `ids`."""
        stretches = functools.partial(self.stretches, params)
        return _in_batches(stretches, self.num_steps, ids, size, self._sharding, shown)

    def stretches(self, params, index_B: jax.Array) -> Iterator[tuple[int, jax.Array]]:
        """Begins a batch, stretch after stretch.

        Yields:
          (steps done, an array that is there once they are); the last are the images [B, H, W, C].
        """
        if self._x is None or len(self._x) != len(index_B):
            x_BNP = functools.partial(jnp.zeros, (len(index_B), *self._x_shape))
            self._x = jax.jit(x_BNP, out_shardings=self._sharding)()
        for first in range(0, self.num_steps, self._length):
            self._x, done = self._advance(params, index_B, self._x, np.int32(first))
            last = first + self._length
            yield last, done if last < self.num_steps else self._join(self._x)


def stretch_length(num_steps: int) -> int:
    """The steps of a stretch: they divide all, into 5 to 20 stretches where that is possible."""
    divisors = [n for n in range(1, max(num_steps // 5, 1) + 1) if num_steps % n == 0]
    return next((n for n in divisors if 20 * n >= num_steps), divisors[-1])


def _jit_stretch(config, mesh, num_steps):
    """(params, index_B, x_BNP, first) -> (x_BNP, steps done)."""
    by_batch, draw = sharding.batch_sharding(mesh), make_draw(config, mesh, num_steps)
    length = stretch_length(num_steps)

    def advance(params, index_B, x_BNP, first):
        stretch = samplers.Stretch(x_BNP, first, length)
        return draw(params, index_B, stretch=stretch), first + length

    return jax.jit(
        advance,
        out_shardings=(by_batch, sharding.replicated(mesh)),
        donate_argnums=2,
        compiler_options=sharding.compiler_options(mesh),
    )


def _in_batches(stretches, num_steps, ids, size, sharding, shown=None):
    """`in_batches` for index_B -> (steps done, images) of each stretch."""

    def begun():
        for first in range(0, len(ids), size):
            batch = ids[first : first + size]
            index_B = np.asarray([*batch, *[batch[-1]] * (size - len(batch))], np.int32)
            index_B = jax.make_array_from_callback((size,), sharding, index_B.__getitem__)
            for step, drawn in stretches(index_B):
                yield first, batch, step, drawn

    def finished(first, batch, step, drawn):
        if step < num_steps:
            jax.block_until_ready(drawn)
            if shown is not None:
                shown.at(first, f"step {step}/{num_steps}", step / num_steps * len(batch))
            return
        gathered = multihost_utils.process_allgather(drawn, tiled=True)
        yield batch, np.asarray(gathered)[: len(batch)]
        if shown is not None:
            shown.at(first + len(batch))

    ahead = collections.deque()  # for the devices, while this process waits or saves images
    for stretch in begun():
        ahead.append(stretch)
        while len(ahead) > _AHEAD or sum(step == num_steps for _, _, step, _ in ahead) > 1:
            yield from finished(*ahead.popleft())
    for stretch in ahead:
        yield from finished(*stretch)


def make_draw(config, mesh: Mesh, steps: int | None = None):
    """Makes (params, index_B) -> uint8 images [B, H, W, C] with those numbers, to be jitted.

    The result also takes `seed` and `label` in place of `config.sample`'s, so that one compiled
    program serves all of them. With `stretch`, it does only those steps, see `samplers.walk`.

    Args:
      config: the run's; its `sample`, `diffusion`, `model` and `data` fields are read.
      mesh: the devices that the batch is split over.
      steps: sampler steps; None for `config.sample.steps`.
    """
    settings, num_classes = config.sample, config.model.num_classes
    model = uvit.make_model(config, mesh)
    process = make_process(config.diffusion, config.data.image_size)
    levels = process.ladder(steps or settings.steps, settings.spacing)
    image_size, patch_size = config.data.image_size, config.model.patch_size

    def draw(params, index_B, seed=settings.seed, label=settings.label, stretch=None):
        keys = jax.vmap(lambda i: rng.stream(seed, "sample", i))(index_B)

        def normal(i):  # normal(0) is x_T, normal(i + 1) the noise of step i
            shape = (*image_size, config.data.channels)
            noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape))(keys)
            return patches.patchify(noise, patch_size)

        def predict_label(x_BNP, time_B, label_B):
            return uvit.apply(model, params, x_BNP, time_B, label_B=label_B)

        if num_classes:
            label_B = jnp.where(label >= 0, label, index_B % num_classes)
            predict = samplers.guided(predict_label, label_B, num_classes, settings.guidance_scale)
        else:
            predict = lambda x, time: predict_label(x, time, None)  # noqa: E731
        x_BNP = samplers.walk(
            predict,
            normal(0),
            lambda i: normal(i + 1),
            levels,
            sampler=settings.sampler,
            eta=settings.eta,
            stretch=stretch,
        )
        return x_BNP if stretch else patches.join(x_BNP, patch_size, image_size)

    return draw
