"""What is measured: five named cases, each a shipped config at one batch, on real images."""

import importlib

import numpy as np

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


def config(name: str, data_dir: str, batch: int | None = None):
    """The config of a case, its images in device memory.

    Args:
      name: one of `NAMES`.
      data_dir: where the prepared sets celebahq (256x256) and celeba64 (64x64) live.
      batch: another batch than the case's.
    """
    config_name, case_batch = CASES[name]
    result = importlib.import_module(f"configs.{config_name}").get_config()
    result.data.dir = data_dir
    result.data.cache = "device"
    result.train.batch_size = result.sample.batch_size = batch or case_batch
    return result


def load_images(config) -> np.ndarray:
    """All images of a config's data set, uint8 [N, H, W, C]."""
    source = sources.open_source(config)
    return np.stack([source[i]["image"] for i in range(len(source))])
