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


def write_digits(data_dir: str | pathlib.Path) -> pathlib.Path:
    """Writes the set into `data_dir` and returns its folder.

    Raises:
      ConfigError: if scikit-learn is missing, with the command that installs it.
    """
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
    return writer.write(
        NAME,
        data_dir,
        examples,
        image_shape=(8, 8, 1),
        classes=[str(i) for i in range(10)],
        description="scikit-learn's 8x8 handwritten digits.",
    )


def _png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()
