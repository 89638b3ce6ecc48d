"""Images on disk: PNGs, each complete or absent, and grids of images."""

import io
import pathlib

import numpy as np
from PIL import Image

from maskdm_jax.run import files


def save_png(path: str | pathlib.Path, image_HWC: np.ndarray) -> None:
    """Writes a uint8 image [H, W, C]; a reader sees the complete file or none.

    One channel is written as grey, three as RGB; any other number as grey channels side by side.
    """
    channels = image_HWC.shape[-1]
    if channels not in (1, 3):
        image_HWC = np.concatenate(np.split(image_HWC, channels, axis=-1), axis=1)
    picture = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)
    with files.whole(path) as unfinished:
        picture.save(unfinished, "PNG")


def is_png(path: str | pathlib.Path, image_size: tuple[int, int]) -> bool:
    """Whether a file is a whole PNG of that height and width; its checksums are compared."""
    try:
        with Image.open(_content(path), formats=["PNG"]) as image:
            image.verify()
            return image.size == (image_size[1], image_size[0])
    except (OSError, SyntaxError, ValueError):
        return False


def shown_scale(image_size: tuple[int, int]) -> int:
    """How many times to enlarge images of that size for viewing."""
    return max(1, 64 // max(image_size))


def grid(images_BHWC: np.ndarray, scale: int = 1, num_classes: int = 0) -> np.ndarray:
    """One picture of uint8 images [B, H, W, C], each enlarged, with white lines between them.

    Args:
      images_BHWC: the images, at least one.
      scale: how many times to enlarge them.
      num_classes: image i has class i mod num_classes, and row c holds those of class c; the last
        images are left out if not all rows would have one. 0, and where that would give fewer than
        four columns: roughly square, row by row.
    """
    batch, height, width, channels = images_BHWC.shape
    by_class = num_classes and batch >= 4 * num_classes
    if by_class:
        batch -= batch % num_classes
    cols = batch // num_classes if by_class else int(np.ceil(batch**0.5))
    rows = num_classes if by_class else -(-batch // cols)
    line = 1
    cell_h, cell_w = height * scale + line, width * scale + line
    picture = np.full((rows * cell_h + line, cols * cell_w + line, channels), 255, np.uint8)
    large = images_BHWC[:batch].repeat(scale, axis=1).repeat(scale, axis=2)
    for i, image in enumerate(large):
        row, col = (i % rows, i // rows) if by_class else (i // cols, i % cols)
        top, left = row * cell_h + line, col * cell_w + line
        picture[top : top + height * scale, left : left + width * scale] = image
    return picture


def _content(path):
    return io.BytesIO(files.as_place(path).read_bytes())


def read_png(path: str | pathlib.Path, channels: int) -> np.ndarray:
    """Reads a PNG written by `save_png`: uint8 [H, W, channels]."""
    with Image.open(_content(path)) as picture:
        image = np.asarray(picture)
    image = image[..., None] if image.ndim == 2 else image
    if channels not in (1, 3):
        image = np.concatenate(np.split(image, channels, axis=1), axis=-1)
    return image
