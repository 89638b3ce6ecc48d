"""The five cases that are measured, each a shipped config at one batch, on real images."""

import importlib

import jax
import numpy as np
from PIL import Image

from maskdm_jax import sharding
from maskdm_jax.config import default_config
from maskdm_jax.data import batch as batch_lib
from maskdm_jax.data import sources

# name: (config, batch)
CASES = {
    "masked256": ("pretrain_celebahq", 256),
    "whole256": ("finetune_celebahq", 64),
    "masked64": ("pretrain_celeba64", 1024),
    "whole64": ("finetune_celeba64", 256),
    "sample256": ("finetune_celebahq", 64),
}
NAMES = tuple(CASES)


def config(name: str, data_dir: str, batch: int | None = None, fields: dict | None = None):
    """The config of a case, with its images in device memory.

    Args:
      name: one of `NAMES`.
      data_dir: the folder of the prepared sets celebahq (256x256) and celeba64 (64x64).
      batch: the batch size; None: the case's.
      fields: values of config fields to override, by dotted name.
    """
    config_name, case_batch = CASES[name]
    result = importlib.import_module(f"configs.{config_name}").get_config()
    result.data.dir = data_dir
    result.data.cache = "device"
    result.train.batch_size = result.sample.batch_size = batch or case_batch
    result.update_from_flattened_dict(fields or {})
    return result


def parse_fields(settings: list[str]) -> dict:
    """{"model.remat": "blocks"} from ["model.remat=blocks"], each value with its field's type."""
    defaults, fields = default_config(), {}
    for setting in settings:
        name, value = setting.split("=", 1)
        default = defaults
        for part in name.split("."):
            default = default[part]
        if isinstance(default, tuple):
            fields[name] = tuple(int(side) for side in value.split(","))
        else:
            fields[name] = type(default)(value)
    return fields


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
