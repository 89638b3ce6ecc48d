"""The cases that are measured, each a shipped config at one batch, on real images."""

import importlib

import jax
import numpy as np
from PIL import Image

from maskdm_jax import config_file, sharding
from maskdm_jax.config import FIELDS, validate, validate_devices
from maskdm_jax.data import batch as batch_lib
from maskdm_jax.data import sources
from maskdm_jax.fields import COUNT, TEXT, number, one_of
from maskdm_jax.run import command_line, distributed

# The configs' recipe, which all figures of RESULTS.md were measured with.
RECIPE = "paper"
# name: (config, batch)
CASES = {
    "masked256": ("pretrain_celebahq", 256),
    "whole256": ("finetune_celebahq", 64),
    "masked64": ("pretrain_celeba64", 1024),
    "whole64": ("finetune_celeba64", 256),
    "sample256": ("finetune_celebahq", 64),
}
NAMES = tuple(CASES)
# Pooled hidden blocks: name: (config, batch, fields).
_POOL = {"mask.hidden": "pool"}
_AT_128 = {"data.image_size": (128, 128), "model.size": "S"}
POOLED = {
    "pooled256": ("pretrain_celebahq", 256, _POOL),
    "pooled128": ("pretrain_celebahq", 512, _POOL | _AT_128),
    "pooled64": ("pretrain_celeba64", 1024, _POOL | {"mask.pool_size": 2}),
}
SECONDS = number(0.01, 3600)


def config(name: str, data_dir: str, batch: int | None = None, fields: dict | None = None):
    """The config of a case, with its images in device memory.

    Args:
      name: a key of `CASES` or `POOLED`.
      data_dir: the folder of the prepared sets celebahq (256x256) and celeba64 (64x64).
      batch: the batch size; None: the case's.
      fields: values of config fields to override, by dotted name.
    """
    config_name, case_batch, own_fields = POOLED.get(name) or (*CASES[name], {})
    result = importlib.import_module(f"configs.{config_name}").get_config(RECIPE)
    result.data.dir = data_dir
    result.data.cache = "device"
    result.train.batch_size = result.sample.batch_size = batch or case_batch
    result.update_from_flattened_dict(own_fields | (fields or {}))
    return result


def parser(about: str, program: str, names: tuple[str, ...]) -> command_line.Parser:
    """The flags that the benchmarks of one case share."""
    example = f"python -m benchmarks.{program} --bench={names[0]} --data_dir=DIR"
    result = command_line.Parser(about, example, FIELDS)
    result.flag("--bench", one_of(*names), "the case", required=True)
    result.flag("--data_dir", TEXT, "folder of the sets", "~/tensorflow_datasets")
    result.flag("--batch", COUNT, "images; the case's if not given")
    result.flag("--seconds", SECONDS, "timed work", 6.0)
    return result


def chosen(args, mode: str):
    """The valid config of a command line that `parser` parsed, for this machine's devices."""
    result = config(args.bench, args.data_dir)
    for change in args.changes:
        config_file.set_field(result, change)
    if args.batch:
        result.train.batch_size = result.sample.batch_size = args.batch
    validate(result)
    validate_devices(result, distributed.num_devices(), mode)
    return result


def open_source(config):
    """The config's data set at its stored size."""
    stored = config.copy_and_resolve_references()
    stored.data.image_size = (256, 256) if config.data.name == "celebahq" else (64, 64)
    return sources.open_source(stored)


def load_images(config) -> np.ndarray:
    """All images of a config's data set, uint8 [N, H, W, C], resized if the config's size differs
    from the set's."""
    source = open_source(config)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    if tuple(config.data.image_size) == images.shape[1:3]:
        return images
    size = config.data.image_size[::-1]
    return np.stack([np.asarray(Image.fromarray(image).resize(size)) for image in images])


def device_arrays(config, mesh) -> dict:
    """The images and labels as the device cache of `data.loader` holds them."""
    images = load_images(config)
    arrays = batch_lib.flat({"image": images, "label": np.zeros(len(images), np.int32)})
    return jax.device_put(arrays, sharding.replicated(mesh))
