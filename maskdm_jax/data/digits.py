"""The embedded data set: scikit-learn's 1,797 real 8x8 grey digits in 10 classes.

Optical Recognition of Handwritten Digits, test part (UCI; Alpaydin & Kaynak 1998). Written once as
a TFDS ArrayRecord set, then read like any other.
"""

import io
import pathlib

import numpy as np
from PIL import Image

from maskdm_jax.data import writer
from maskdm_jax.errors import ConfigError

NAME = "digits"


def write_digits(data_dir: str | pathlib.Path) -> None:
    """Writes the set into `data_dir` if it is not there yet.

    Raises:
      ConfigError: if scikit-learn is missing, with the command that installs it, or if `data_dir`
        cannot be written to.
      RunError: if the disk is full.
    """
    if writer.exists(NAME, data_dir):
        return
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "data.name digits needs scikit-learn; type: pip install 'maskdm_jax[demo]'"
        ) from error
    digits = load_digits()
    # The source's values are 0 to 16.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    examples = (
        (_png(image), str(label), f"{i:04d}")
        for i, (image, label) in enumerate(zip(pixels, digits.target, strict=True))
    )
    with writer.sole_writer(NAME, data_dir, "--config.data.dir"):
        if not writer.exists(NAME, data_dir):  # another process may have written it meanwhile
            writer.write(
                NAME,
                data_dir,
                {"train": examples},
                num_examples=len(pixels),
                image_shape=(8, 8, 1),
                classes=[str(i) for i in range(10)],
                description="scikit-learn's 8x8 handwritten digits.",
            )


def _png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()
