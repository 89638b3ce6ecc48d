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
    return _jit(make_draw(config, mesh, steps), mesh, out_sharding)


def jit_interpolation(config, mesh: Mesh, out_sharding: NamedSharding):
    """`make_interpolation` under jit on `mesh`; the images have `out_sharding`."""
    return _jit(make_interpolation(config, mesh), mesh, out_sharding)


def _jit(draw, mesh, out_sharding):
    options = sharding.compiler_options(mesh)
    return jax.jit(draw, out_shardings=out_sharding, compiler_options=options)


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
    """Draws batches in stretches of the walk's rows, so that a person sees a long one advance.

    The devices get several stretches at once, so that they never wait, and the images are those of
    `jit_draw`.
    """

    def __init__(self, config, mesh: Mesh, steps: int | None = None, given: dict | None = None):
        """
        Args:
          config, mesh, steps: as for `make_draw`.
          given: NumPy arrays that its result takes to start from images; None: from noise.
        """
        levels = _ladder(config, steps or config.sample.steps, from_image=bool(given))
        self._num_rows = samplers.evaluations(config.sample.sampler, len(levels.signal))
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
        size: int,
        shown: progress.Progress | None = None,
    ) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """As the function of this name, but `shown`, if given, counts the images of `ids`."""
        stretches = functools.partial(self.stretches, params)
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
    by_batch, draw = sharding.batch_sharding(mesh), make_draw(config, mesh, steps)

    def advance(params, index_B, carry, first, given):
        stretch = samplers.Stretch(carry, first, length)
        return draw(params, index_B, stretch=stretch, **given), first + length

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


def make_draw(config, mesh: Mesh, steps: int | None = None):
    """Makes (params, index_B) -> uint8 images [B, H, W, C] with those numbers, to be jitted.

    The result also takes `seed` and `label` in place of `config.sample`'s, so that one compiled
    program serves all of them. With `images`, uint8 [M, H, W, C], image i starts from images[i mod
    M], in the last `sample.strength` of the steps; where `known`, bool [H, W], is true, it stays as
    it is. With a strength of 1, nothing else of it is seen. With `stretch`, it does only those rows
    of the walk and returns the carry, see `samplers.walk`.

    Args:
      config: the run's; its `sample`, `diffusion`, `model` and `data` fields are read.
      mesh: the devices that the batch is split over.
      steps: sampler steps; None for `config.sample.steps`.
    """
    settings = config.sample
    patch_size, channels = config.model.patch_size, config.data.channels
    walk = _make_walk(config, mesh, steps)

    def draw(
        params, index_B, seed=settings.seed, label=settings.label, images=None, known=None,
        stretch=None,
    ):  # fmt: skip
        normal, label_B = _noise(config, seed, index_B), _labels(config, label, index_B)
        if images is None:
            return walk(params, normal, label_B, stretch=stretch)
        x0_BNP = patches.cut(images[index_B % len(images)], patch_size)
        if known is not None:
            known = jnp.broadcast_to(known[None, :, :, None], (1, *known.shape, channels))
            known = patches.patchify(known, patch_size)
            if settings.strength == 1:
                x0_BNP = jnp.where(known, x0_BNP, 0)
        return walk(params, normal, label_B, image=x0_BNP, known=known, stretch=stretch)

    return draw


def make_interpolation(config, mesh: Mesh):
    """Makes (params, index_B, seed_a, seed_b, num) -> uint8 images [B, H, W, C], to be jitted.

    They are those with the numbers index_B of `num` on the way from image 0 of one seed to that of
    another. Their noise is cos(angle) a + sin(angle) b, which is unit normal at every angle.
    """
    settings, walk = config.sample, _make_walk(config, mesh)

    def draw(params, index_B, seed_a, seed_b, num, label=settings.label):
        first_B = jnp.zeros_like(index_B)
        ends = [_noise(config, seed, first_B) for seed in (seed_a, seed_b)]
        angle_B11 = (index_B * (jnp.pi / 2) / (num - 1))[:, None, None]

        def normal(i):
            a, b = (end(i) for end in ends)
            return jnp.cos(angle_B11) * a + jnp.sin(angle_B11) * b

        return walk(params, normal, _labels(config, label, first_B))

    return draw


def classes_in_turn(config) -> int:
    """n, if image i has class i mod n; 0 if all have the same class, or none."""
    return config.model.num_classes if config.sample.label < 0 else 0


def evaluations(config, from_image: bool = False) -> int:
    """Evaluations of the network for one image of `config.sample`; guidance takes two at a time."""
    levels = _ladder(config, config.sample.steps, from_image)
    count = samplers.evaluations(config.sample.sampler, len(levels.signal))
    if config.sample.guidance_scale == 1:
        return count
    times = _guided_times(config, levels)
    if times is None:
        return 2 * count
    time = samplers.visited(levels, config.sample.sampler).time
    return count + int(np.sum((times[0] <= time) & (time <= times[1])))


def _make_walk(config, mesh, steps=None):
    """(params, normal, label_B, image, known, stretch) -> uint8 images, or the carry of a stretch;
    normal(0) is x_T's noise, and normal(i + 1) that of step i."""
    settings, num_classes = config.sample, config.model.num_classes
    model = uvit.make_model(config, mesh)
    image_size, patch_size = config.data.image_size, config.model.patch_size
    threshold = settings.threshold
    clip = samplers.dynamic_clip(threshold) if threshold else samplers.static_clip

    def walk(params, normal, label_B, image=None, known=None, stretch=None):
        levels = _ladder(config, steps or settings.steps, image is not None)

        def predict_label(x_BNP, time_B, label_B):
            return uvit.apply(model, params, x_BNP, time_B, label_B=label_B)

        if num_classes:
            times = _guided_times(config, levels)
            predict = samplers.guided(
                predict_label, label_B, num_classes, settings.guidance_scale, times
            )
        else:
            predict = lambda x, time: predict_label(x, time, None)  # noqa: E731
        walked = samplers.walk(
            predict,
            normal(0),
            lambda i: normal(i + 1),
            levels,
            sampler=settings.sampler,
            eta=settings.eta,
            recompute_eps=settings.recompute_eps,
            clip=clip,
            image=image,
            known=known,
            stretch=stretch,
        )
        return walked if stretch else patches.join(walked, patch_size, image_size)

    return walk


def _noise(config, seed, index_B):
    """i -> unit normal noise [B, N, P] of the images with the numbers index_B."""
    keys = jax.vmap(lambda i: rng.stream(seed, "sample", i))(index_B)

    def normal(i):
        shape = (*config.data.image_size, config.data.channels)
        noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape))(keys)
        return patches.patchify(noise, config.model.patch_size)

    return normal


def _labels(config, label, index_B):
    """The class of each image; None without classes."""
    num_classes = config.model.num_classes
    return jnp.where(label >= 0, label, index_B % num_classes) if num_classes else None


def _ladder(config, steps, from_image):
    """The sampler's levels; from an image, the last `sample.strength` of them."""
    process = make_process(config.diffusion, config.data.image_size)
    levels = process.ladder(steps, config.sample.spacing)
    if not from_image:
        return levels
    count = max(round(config.sample.strength * steps), 1)
    return jax.tree.map(lambda x: x if isinstance(x, float) else x[-count:], levels)


def _guided_times(config, levels):
    """The least and greatest time of the levels within `sample.guidance_interval`; None for all.

    Its shares are of the way in log(signal / noise) from the noisiest to the cleanest level that
    the sampler can visit.
    """
    low, high = config.sample.guidance_interval
    if (low, high) == (0, 1):
        return None
    process = make_process(config.diffusion, config.data.image_size)
    ends = process.ladder(2, "log_snr")
    first, last = np.log(ends.signal / ends.noise)
    share = np.clip((np.log(levels.signal / levels.noise) - first) / (last - first), 0, 1)
    times = levels.time[(low <= share) & (share <= high)]
    return (times.min(), times.max()) if len(times) else (np.inf, -np.inf)
