"""`--mode=sample`: draws images from a checkpoint, or an official file, into numbered files.

Image i depends on (seed, i) alone, so an interrupted run resumes with the missing images.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import pathlib

import numpy as np
from jax.sharding import Mesh

from maskdm_jax import draw, draw_batches, images, sharding
from maskdm_jax.config import FIELDS, get, without_later
from maskdm_jax.data import pixels
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import quoted
from maskdm_jax.run import distributed, faults, files, lock, progress
from maskdm_jax.run.progress import say
from maskdm_jax.weights import saved

# Fields that no image depends on; of the last two, images depend on the files' content.
_FREE = (
    "sample.num", "sample.batch_size", "sample.preview_num", "sample.preview_steps",
    "sample.init_image", "sample.init_mask",
)  # fmt: skip


def write_samples(
    config, workdir: str | pathlib.Path, step: int | None = None, params=None, drawing=None
) -> pathlib.Path:
    """Draws `config.sample.num` images from the newest checkpoint of `workdir`, or that of `step`;
    if the workdir has none, from the official file `config.init.path`.

    Writes <workdir>/samples/<settings>/000000.png and so on, grid.png (of the first 64 at most) and
    settings.json. Existing images are kept.

    Args:
      config: the run's.
      workdir: the run's folder.
      step: of the checkpoint.
      params: its weights, as `restore` returns them, if the caller has them already.
      drawing: `draw_batches.Drawing` of this config, likewise.

    Returns:
      The folder.

    Raises:
      ConfigError: if there is neither checkpoint nor file, or one of a different architecture.
    """
    workdir = files.as_place(workdir).expanduser()
    given = start_image(config)
    # Process 0 alone writes; the others follow what it finds, and help to draw.
    step = saved.find_step(config, workdir, step)
    network = saved.at(config, workdir, step)
    config = network.network(config)
    settings = config.sample
    folder = folder_of(config, workdir, step)
    said = {**network.provenance, **settings.to_dict()}
    said["evaluations"] = draw.evaluations(config, from_image=bool(given))
    if step is None and params is None:
        say(f"{workdir} has no checkpoint: drawing from {network.where} ({settings.weights})")
    with _writing(config, folder):
        if distributed.is_main():
            files.write_text(folder / "settings.json", json.dumps(said, indent=2) + "\n")
        todo = distributed.agreed(missing(config, folder))
        if len(todo) < settings.num:
            say(f"{settings.num - len(todo)} of {settings.num} images are already in {folder}")
        if todo:
            mesh = sharding.make_mesh(config)
            if params is None:
                params = restore(config, workdir, step, mesh, settings.weights)
            other = "ema" if settings.weights == "raw" else "raw"
            faults.check_finite(
                params,
                f"{network.where} ({settings.weights})",
                f"another --workdir, or --config.sample.weights={other}",
            )
            drawing = drawing or draw_batches.Drawing(config, mesh, given=given, num=settings.num)
            _draw_missing(config, folder, todo, params, drawing, said["evaluations"])
        if distributed.is_main():
            _draw_grid(config, folder)
    return folder


def start_image(config) -> dict[str, np.ndarray]:
    """What `draw.make_draw`'s result takes to start from `sample.init_image`; empty for noise.

    Returns:
      "images" uint8 [1, H, W, C] and, with `sample.init_mask`, "known" bool [H, W].

    Raises:
      ConfigError: for a file that is no picture, or one of another size than `data.image_size`.
    """
    settings = config.sample
    if not settings.init_image:
        for name, none in (("init_mask", ""), ("strength", 1.0)):
            if settings[name] != none:
                raise ConfigError(
                    f"sample.{name} is {settings[name]!r}, but sample.init_image is empty; "
                    "expected a picture to start from; type --config.sample.init_image=FILE, or "
                    f"--config.sample.{name}={quoted(none)}"
                )
        return {}
    given = {"images": _picture(config, "init_image", config.data.channels)[None]}
    if settings.init_mask:
        given["known"] = _picture(config, "init_mask", 1)[..., 0] >= 128
    return given


def _picture(config, name, channels):
    typed = config.sample[name]
    path = files.local_path(typed, f"--config.sample.{name}")
    height, width = config.data.image_size
    remedy = f"type --config.sample.{name}=FILE with a picture of that size"
    try:
        if channels in (1, 3, 4):  # as training reads it
            picture = pixels.decode(path.read_bytes(), channels)
        else:
            picture = images.read_png(path, channels)
    except Exception as error:  # Pillow raises any
        raise ConfigError(
            f"sample.{name} is {typed}, which is no picture that can be read; expected one of "
            f"{height}x{width} pixels; {remedy}"
        ) from error
    if picture.shape[:2] != (height, width):
        found = "x".join(map(str, picture.shape[:2]))
        raise ConfigError(
            f"sample.{name} is {typed}, of {found} pixels; expected {height}x{width}, "
            f"data.image_size; {remedy}"
        )
    return picture


def restore(config, workdir: pathlib.Path, step: int | None, mesh: Mesh, weights: str):
    """The weights of a checkpoint, or (None) of the file; see `saved` for arguments and errors."""
    abstract = draw.abstract_params(config, mesh)
    return saved.at(config, workdir, step).restore(config, abstract, weights)


@contextlib.contextmanager
def _writing(config, folder):
    """Makes `folder`, whose images one process writes at a time, and explains what goes wrong."""

    def needed_bytes():  # about that of the images as PNGs
        image_bytes = math.prod(config.data.image_size) * config.data.channels
        return len(missing(config, folder)) * image_bytes

    remedy = "make room, then the same command draws the rest"
    with contextlib.ExitStack() as stack:
        stack.enter_context(faults.explain_full_disk("the images", folder, remedy, needed_bytes))
        try:
            files.make_folder(folder)
        except OSError as error:
            if faults.disk_is_full(error):
                raise
            raise ConfigError(
                f"{folder} cannot be written to: {error}; samples go under --workdir, so make it "
                "writable, or copy the run and type the copy's --workdir"
            ) from error
        if distributed.is_main() and stack.enter_context(lock.hold(folder)):
            files.remove_leftovers(folder, "*")
        yield


def missing(config, folder: pathlib.Path) -> list[int]:
    """Numbers of the images of `config.sample.num` that are not there, or not whole."""
    height, width = config.data.image_size
    if config.data.channels not in (1, 3):
        width *= config.data.channels  # see `images.save_png`
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    paths = [image_path(folder, i) for i in range(config.sample.num)]
    found = [i for i, path in enumerate(paths) if path.name in there]
    with _many_files() as pool:
        whole = pool.map(lambda i: images.is_png(paths[i], (height, width)), found)
        kept = {i for i, is_whole in zip(found, whole, strict=True) if is_whole}
    return [i for i in range(len(paths)) if i not in kept]


def _many_files():
    """Threads that read or write small files: a bucket takes a while for each."""
    return concurrent.futures.ThreadPoolExecutor(16, thread_name_prefix="images")


def _draw_grid(config, folder):
    settings = config.sample
    channels = config.data.channels
    shown = [images.read_png(image_path(folder, i), channels) for i in range(min(settings.num, 64))]
    scale = images.shown_scale(config.data.image_size)
    picture = images.grid(np.stack(shown), scale, draw.classes_in_turn(config))
    images.save_png(folder / "grid.png", picture)
    say(f"{settings.num} images in {folder}, an overview in {folder / 'grid.png'}")


def _draw_missing(config, folder, todo, params, drawing, evaluations):
    say(
        f"drawing {len(todo)} images with {config.sample.sampler}, {evaluations} evaluations each, "
        f"{min(drawing.batch_size, len(todo))} at a time, into {folder}"
    )
    with progress.Progress("drawing", len(todo), "images") as shown, _many_files() as pool:
        for batch, drawn in drawing.in_batches(params, todo, shown):
            if distributed.is_main():
                paths = [image_path(folder, i) for i in batch]
                list(pool.map(images.save_png, paths, drawn))


def folder_of(config, workdir: pathlib.Path, step: int | None) -> pathlib.Path:
    """The folder of the samples of a checkpoint, or (None) of the file of `init.path`.

    Images that differ in more than their index go to different folders.

    What most people vary is in words. The hash at the end covers the weights' bytes and every
    field that the images may depend on.
    """
    s, network = config.sample, saved.at(config, workdir, step)
    name = f"{network.name}_{s.weights}_{s.sampler}{s.steps}"
    if s.sampler == "ddim":
        name += f"_eta{s.eta:g}"
    if s.spacing != "timestep":
        name += f"_{s.spacing}"
    if s.ema_std:
        name += f"_std{s.ema_std:g}"
    if s.guidance_scale != 1:
        name += f"_guidance{s.guidance_scale:g}"
    if s.label >= 0:
        name += f"_label{s.label}"
    if s.init_image:
        name += "_inpainted" if s.init_mask else f"_strength{s.strength:g}"
    groups = ("data.image_size", "data.channels", "model.", "diffusion.", "sample.")
    fields = {n: get(config, n) for n in FIELDS if n.startswith(groups) and n not in _FREE}
    fields = without_later(fields)
    given = [pathlib.Path(path).expanduser() for path in (s.init_image, s.init_mask) if path]
    pictures = [hashlib.sha256(path.read_bytes()).hexdigest() for path in given]
    parts = json.dumps([network.fingerprint(), fields, *pictures])
    content = hashlib.sha256(parts.encode()).hexdigest()
    return workdir / "samples" / f"{name}_seed{s.seed}_{content[:8]}"


def image_path(folder: pathlib.Path, index: int) -> pathlib.Path:
    """The file of image `index` in a folder of samples."""
    return folder / f"{index:06d}.png"
