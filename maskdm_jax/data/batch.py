"""What a step reads: a batch as it arrives on the devices, and its images.

Images are uint8 on the devices. A batch holds its images or, if the devices hold the whole set
(`data.cache` is "device"), only their ids.
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from maskdm_jax import sharding


def flat(cache: dict) -> dict[str, np.ndarray]:
    """A whole set in its layout on the devices: one row per image, uint8 [N, H * W * C].

    A TPU would copy all of [N, H, W, C], with 3 channels last, into another layout in every step
    before gathering the batch.
    """
    image, label = np.asarray(cache["image"]), np.asarray(cache["label"])
    return {"image": image.reshape(len(image), -1), "label": label}


def materialize(config, arrays: dict, batch: dict) -> dict:
    """The images of a batch; call it under jit.

    Args:
      config: the run's.
      arrays: what stays on the devices, see `flat`; empty if the batch holds the images.
      batch: {"ids": int32 [B]}, or already what this returns.

    Returns:
      {"image": uint8 [B, H, W, C], "label": int32 [B]}.
    """
    if not arrays:
        return batch
    shape = (-1, *config.data.image_size, config.data.channels)
    ids = batch["ids"]
    return {"image": arrays["image"][ids].reshape(shape), "label": arrays["label"][ids]}


def abstract_inputs(config, num_examples: int, mesh: Mesh) -> tuple[dict, dict]:
    """Shapes, dtypes and shardings of `arrays` and a batch, for a set of `num_examples` images."""
    size = config.train.batch_size
    shape = (*config.data.image_size, config.data.channels)

    def array(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    by_batch = sharding.batch_sharding(mesh)
    if config.data.cache != "device":
        image = array((size, *shape), np.uint8, by_batch)
        return {}, {"image": image, "label": array((size,), np.int32, by_batch)}
    everywhere = sharding.replicated(mesh)
    arrays = {
        "image": array((num_examples, math.prod(shape)), np.uint8, everywhere),
        "label": array((num_examples,), np.int32, everywhere),
    }
    return arrays, {"ids": array((size,), np.int32, by_batch)}
