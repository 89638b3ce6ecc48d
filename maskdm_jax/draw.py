"""Drawing: from parameters and image numbers to pixels.

Image i depends on (seed, i) alone, since its noise comes from its own key. Image i is therefore the
same for any batch size and number of devices.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from maskdm_jax import rng, sharding
from maskdm_jax.diffusion import make_process, samplers
from maskdm_jax.model import patches, uvit


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

    def begun(first):
        batch = ids[first : first + size]
        index_B = np.asarray([*batch, *[batch[-1]] * (size - len(batch))], np.int32)
        index_B = jax.make_array_from_callback((size,), sharding, index_B.__getitem__)
        return batch, jitted(params, index_B)

    def finished(batch, drawn):
        return batch, np.asarray(multihost_utils.process_allgather(drawn, tiled=True))[: len(batch)]

    before = None
    for first in range(0, len(ids), size):
        current = begun(first)
        if before is not None:
            yield finished(*before)
        before = current
    if before is not None:
        yield finished(*before)


def make_draw(config, mesh: Mesh, steps: int | None = None):
    """Makes (params, index_B) -> uint8 images [B, H, W, C] with those numbers, to be jitted.

    The result also takes `seed` and `label` in place of `config.sample`'s, so that one compiled
    program serves all of them.

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

    def draw(params, index_B, seed=settings.seed, label=settings.label):
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
        )
        return patches.join(x_BNP, patch_size, image_size)

    return draw
