"""Drawing images from a checkpoint.

Image i depends on (seed, i) alone: its noise comes from its own key. So a run that was interrupted
goes on where it stopped, and another batch size or number of devices gives the same image i.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from maskdm_jax import (
    checkpoint,
    diffusion,
    distributed,
    images,
    patches,
    progress,
    rng,
    sampler,
    sharding,
    uvit,
)
from maskdm_jax.config import check_same_architecture
from maskdm_jax.errors import ConfigError
from maskdm_jax.progress import say


def jit_sampler(config, mesh: Mesh, model: uvit.UViT, out_sharding, steps: int | None = None):
    """`make_sampler` under jit on `mesh`; the images come back laid out as `out_sharding`."""
    return jax.jit(
        make_sampler(config, model, steps),
        out_shardings=out_sharding,
        compiler_options=sharding.compiler_options(mesh),
    )


def make_sampler(config, model: uvit.UViT, steps: int | None = None):
    """(params, index_B) -> uint8 images [B, H, W, C] with those indices, to be jitted.

    Args:
      config: its `sample` and `diffusion` fields.
      model: from `uvit.make_model`.
      steps: network evaluations; default `config.sample.steps`.
    """
    settings = config.sample
    shape = (*config.data.image_size, config.data.channels)
    patch_size = config.model.patch_size
    alphas_cumprod = diffusion.make_alphas_cumprod(config.diffusion, config.data.image_size)
    num_classes = config.model.num_classes

    def draw(params, index_B):
        keys = jax.vmap(lambda i: rng.stream(settings.seed, "sample", i))(index_B)

        def normal(i):  # 0 is x_T, i + 1 the noise of step i
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape))(keys)

        def predict_label(x_BHWC, t_B, label_B):
            x_BNP = patches.patchify(x_BHWC, patch_size)
            out_BNP = uvit.apply(model, params, x_BNP, t_B, label_B=label_B)
            return patches.unpatchify(out_BNP, patch_size, config.data.image_size)

        if num_classes:
            label_B = index_B % num_classes
            if settings.label >= 0:
                label_B = jnp.full_like(index_B, settings.label)
            predict = sampler.guided(predict_label, label_B, num_classes, settings.guidance_scale)
        else:
            predict = lambda x, t: predict_label(x, t, None)  # noqa: E731
        image = sampler.sample(
            predict,
            normal(0),
            lambda i: normal(i + 1),
            alphas_cumprod,
            sampler=settings.sampler,
            steps=steps or settings.steps,
            eta=settings.eta,
            prediction=config.diffusion.prediction,
        )
        return jnp.clip(jnp.rint((image + 1) * 127.5), 0, 255).astype(jnp.uint8)

    return draw


def sample(config, workdir: str | pathlib.Path) -> pathlib.Path:
    """Draws `config.sample.num` images from the newest checkpoint of `workdir`.

    Writes <workdir>/samples/<settings>/000000.png and so on, grid.png (of the first 64) and
    settings.json. Images that are there already are kept.

    Returns:
      The folder.

    Raises:
      ConfigError: where the workdir holds no checkpoint, or one of another architecture.
    """
    workdir = pathlib.Path(workdir).expanduser()
    # Process 0 alone writes: the others go by what it finds, and help to draw.
    step = checkpoint.find_step(workdir)
    check_same_architecture(config, checkpoint.load_config(workdir, step), str(workdir))
    settings = config.sample
    folder = workdir / "samples" / _folder_name(config, step)
    said = {"step": step, "workdir": str(workdir), **settings.to_dict()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if distributed.is_main():
            (folder / "settings.json").write_text(json.dumps(said, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written to: {error}; samples go below --workdir, so make it "
            "writable, or copy the run and type the copy's --workdir"
        ) from error

    todo = [i for i in range(settings.num) if not _path(folder, i).exists()]
    todo = distributed.agreed(todo)
    if len(todo) < settings.num:
        say(f"{settings.num - len(todo)} of {settings.num} images are in {folder} already")
    if todo:
        _draw_missing(config, workdir, step, folder, todo)
    if not distributed.is_main():
        return folder
    channels = config.data.channels
    shown = [images.read_png(_path(folder, i), channels) for i in range(min(settings.num, 64))]
    scale = images.shown_scale(config.data.image_size)
    images.save_png(folder / "grid.png", images.grid(np.stack(shown), scale))
    say(f"{settings.num} images in {folder}, the first {len(shown)} in {folder / 'grid.png'}")
    return folder


def _draw_missing(config, workdir, step, folder, todo):
    mesh = sharding.make_mesh(config)
    model = uvit.make_model(config, mesh)
    abstract = sharding.abstract(lambda: uvit.init_params(model, jax.random.key(0)), mesh)
    item = "ema" if config.sample.weights == "ema" else "params"
    params = checkpoint.restore_item(workdir, step, item, abstract)
    by_batch = sharding.batch_sharding(mesh)
    draw = jit_sampler(config, mesh, model, by_batch)

    size = config.sample.batch_size
    say(f"drawing {len(todo)} images with {config.sample.sampler}, {config.sample.steps} steps")
    firsts = range(0, len(todo), size)
    for first in progress.track(firsts, len(firsts), "sampling", f"batches of {size}"):
        batch = todo[first : first + size]
        # The last batch is filled up, so that one shape is compiled.
        index_B = np.asarray(batch + [batch[-1]] * (size - len(batch)), np.int32)
        index_B = jax.make_array_from_callback((size,), by_batch, index_B.__getitem__)
        drawn = multihost_utils.process_allgather(draw(params, index_B), tiled=True)
        if distributed.is_main():
            for i, image in zip(batch, drawn, strict=False):
                images.save_png(_path(folder, i), image)


def _folder_name(config, step):
    """Images that differ in anything but their index lie in different folders."""
    s = config.sample
    name = f"step{step}_{s.weights}_{s.sampler}{s.steps}"
    if s.sampler == "ddim":
        name += f"_eta{s.eta:g}"
    if s.guidance_scale != 1:
        name += f"_guidance{s.guidance_scale:g}"
    if s.label >= 0:
        name += f"_label{s.label}"
    if config.model.dtype != "bfloat16":
        name += f"_{config.model.dtype}"
    return f"{name}_seed{s.seed}"


def _path(folder, index):
    return folder / f"{index:06d}.png"
