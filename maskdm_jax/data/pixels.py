"""From encoded images to pixels, by Pillow alone: the same on every machine.

TFDS decodes with OpenCV where that is installed and with Pillow elsewhere, and the two read some
files differently: 16-bit colours, transparent colours, the orientation in a photograph's EXIF data.
"""

import io
import warnings

import numpy as np
from PIL import Image

# What Pillow recognises but cannot decode by itself.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_MODES = {1: "L", 3: "RGB"}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF


def formats() -> list[str]:
    """Pillow's names of the formats that it can decode here."""
    Image.init()
    return sorted(Image.OPEN.keys() - _NOT_DECODED)


def suffixes() -> set[str]:
    """The file name suffixes of those formats, in lower case, with their dots."""
    decoded = set(formats())
    return {suffix for suffix, name in Image.EXTENSION.items() if name in decoded}


def decode(data: bytes, channels: int) -> np.ndarray:
    """The uint8 pixels [H, W, channels] of an encoded image; 1 or 3 channels as by `to_8_bits`,
    before white.

    Raises:
      Exception: of any type, from Pillow, if `data` is not a whole image.
    """
    with Image.open(io.BytesIO(data)) as image:
        if channels == 4:
            converted = image.convert("RGBA")
        else:
            check_depth(image, data)
            converted = to_8_bits(image, channels, (255, 255, 255))
        return np.asarray(converted).reshape(image.height, -1, channels)


def check_depth(image: Image.Image, data: bytes) -> None:
    """Refuses what Pillow reads wrongly, or with another range than it says.

    Args:
      image: opened from `data`.
      data: the file.

    Raises:
      ValueError: why.
    """
    if image.format == "PNG" and data[24] == 16 and "transparency" in image.info:
        raise ValueError("it has 16 bits and a transparent colour; expected an alpha channel")
    if image.format != "TIFF":
        return
    tags = image.tag_v2
    bits, formats = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
    if 2 in formats:
        raise ValueError("it has signed integers; expected unsigned ones")
    if image.mode.startswith("I;16") and (set(bits) != {16} or tags.get(_PHOTOMETRIC) != 1):
        raise ValueError(f"it has {bits[0]} bits, or 0 for white; expected 16 bits, 0 for black")


def is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether every decoder reads the same pixels from `data`, the file of `image`.

    True for a JPEG or PNG of 8 bits per channel, grey or RGB, upright, and without a transparent
    colour or a second frame.
    """
    return (
        image.format in ("JPEG", "PNG")
        and image.mode in ("L", "RGB")
        and (image.format == "JPEG" or data[24] == 8)  # bits per channel, in the PNG's first chunk
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and image.getexif().get(0x0112, 1) == 1  # the orientation
    )


def to_8_bits(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Image.Image:
    """An image of any mode as 8-bit grey (1 channel) or RGB (3).

    Args:
      image: transparent parts are laid over `background`; 16 bits lose their lower 8; float values
        are taken to lie from 0 to 1.
      channels: 1 or 3.
      background: RGB, 0 to 255 each.

    Raises:
      ValueError: if the range of the values is not known.
    """
    if image.mode.startswith("I;16"):  # Pillow's own conversion saturates at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I" and image.format == "PPM":  # Pillow scales its values to 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I":
        raise ValueError("it has 32-bit integers, whose range is not known; expected 8 or 16 bits")
    elif image.mode == "F":
        image = _from_float(np.asarray(image))
    if image.has_transparency_data:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about palettes; the conversion is right
            image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert(_MODES[channels])


def _from_float(values):
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # false for nan too
        raise ValueError(f"its float values lie from {low:g} to {high:g}; expected 0 to 1")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))
