"""Drawing: from parameters and image numbers to pixels.

Image i depends on (seed, i) alone, since its noise comes from its own key. Image i is therefore the
same for any batch size and number of devices.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maskdm_jax import denoiser, flops, rng, sharding
from maskdm_jax.diffusion import make_process, samplers
from maskdm_jax.model import patches, uvit


def batch_size(config, mesh: Mesh, num: int | None = None) -> int:
    """How many images to draw at a time: `sample.batch_size`, or as few as `num` needs.

    On GPUs it is rounded up, by an eighth at most, until the images of a device have a multiple of
    8 tokens together. Otherwise drawing in bfloat16 took 1.4 times as long on an H100, see
    docs/speed.md. (Tokens that some kernels pad with are not counted.)
    """
    size = config.sample.batch_size
    if num is not None:
        size = min(size, -(-num // mesh.size) * mesh.size)
    if sharding.first_device(mesh).platform != "gpu" or config.model.dtype != "bfloat16":
        return size
    model = uvit.make_model(config, mesh)
    multiple = mesh.size * 8 // math.gcd(model.num_patches + model.num_extra_tokens, 8)
    aligned = -(-size // multiple) * multiple
    return aligned if 8 * aligned <= 9 * size else size


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
    """`jit_draw` for `batch_size` images, lowered from shapes alone."""
    by_batch = sharding.batch_sharding(mesh)
    index_B = jax.ShapeDtypeStruct((batch_size(config, mesh),), np.int32, sharding=by_batch)
    return jit_draw(config, mesh, by_batch, steps).lower(abstract_params(config, mesh), index_B)


def abstract_params(config, mesh: Mesh):
    """Shapes, dtypes and shardings on `mesh` of the network's parameters."""
    model = uvit.make_model(config, mesh)
    return sharding.abstract(lambda: uvit.init_params(model, jax.random.key(0)), mesh)


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


def num_rows(config, steps: int | None = None, from_image: bool = False) -> int:
    """Rows of the sampler's walk, each with one evaluation of the network.

    Args:
      config: the run's.
      steps: sampler steps; None for `config.sample.steps`.
      from_image: whether it starts from an image, and so takes the last of them alone.
    """
    levels = _ladder(config, steps or config.sample.steps, from_image)
    return samplers.evaluations(config.sample.sampler, len(levels.signal))


def evaluations(config, from_image: bool = False) -> int:
    """Evaluations of the network for one image of `config.sample`; guidance takes two at a time."""
    return sum(evaluations_by_size(config, from_image).values())


def evaluations_by_size(config, from_image: bool = False) -> dict[int, int]:
    """The same by the size of the tokens, see `denoiser.Tier`; 1 for patches."""
    levels = _ladder(config, config.sample.steps, from_image)
    visited = samplers.visited(levels, config.sample.sampler)
    count = np.ones_like(visited.noise, np.int64)
    if config.sample.guidance_scale != 1:
        low, high = _guided_times(config, levels) or (-np.inf, np.inf)
        count += (low <= visited.time) & (visited.time <= high)
    ratio = visited.noise / visited.signal
    return {
        tier.size: int(count[(tier.low < ratio) & (ratio <= tier.high)].sum())
        for tier in denoiser.tiers(config)
    }


def model_flops(config) -> float:
    """Model FLOPs of drawing one image of `config.sample`."""
    lengths = {1: flops.tokens_per_image(config), **flops.coarse_tokens(config)}
    calls = evaluations_by_size(config).items()
    return sum(count * flops.forward_flops(config, lengths[size]) for size, count in calls)


def _make_walk(config, mesh, steps=None):
    """(params, normal, label_B, image, known, stretch) -> uint8 images, or the carry of a stretch;
    normal(0) is x_T's noise, and normal(i + 1) that of step i."""
    settings, num_classes = config.sample, config.model.num_classes
    process = make_process(config.diffusion, config.data.image_size)
    apply = denoiser.make_predict(config, mesh, process, alike=True)
    image_size, patch_size = config.data.image_size, config.model.patch_size
    threshold = settings.threshold
    clip = samplers.dynamic_clip(threshold) if threshold else samplers.static_clip

    def walk(params, normal, label_B, image=None, known=None, stretch=None):
        levels = _ladder(config, steps or settings.steps, image is not None)

        def predict_label(x_BNP, time_B, label_B):
            return apply(params, x_BNP, time_B, label_B)

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
