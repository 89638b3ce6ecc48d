"""From encoded images to pixels, by Pillow alone: the same on every machine. And the named crops.

TFDS decodes with OpenCV where that is installed and with Pillow elsewhere, and the two read some
files differently: 16-bit colours, transparent colours, the orientation in a photograph's EXIF data.
"""

import functools
import io
import warnings

import numpy as np
from PIL import Image, ImageOps

WHITE = (255, 255, 255)
# What Pillow recognises but cannot decode by itself.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
CELEBA_SIZE = (178, 218)  # width, height


@functools.cache
def formats() -> list[str]:
    """Pillow's names of the formats that it can decode here."""
    Image.init()
    return sorted(Image.OPEN.keys() - _NOT_DECODED)


@functools.cache
def suffixes() -> set[str]:
    """The file name suffixes of those formats, in lower case, with their dots."""
    decoded = set(formats())
    return {suffix for suffix, name in Image.EXTENSION.items() if name in decoded}


def decode(
    data: bytes, channels: int, crop: str = "none", size: tuple[int, int] | None = None
) -> np.ndarray:
    """The uint8 pixels [H, W, channels] of an encoded image, upright and on white.

    Args:
      data: a file that Pillow reads.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA, as stored).
      crop: a crop of `cropped`, or "none".
      size: (height, width) that the crop is resized to.

    Raises:
      Exception: of any type, from Pillow, if `data` is not a whole image.
    """
    with Image.open(io.BytesIO(data), formats=formats()) as image:
        if channels != 4 and not is_plain(image, data):
            check_depth(image, data)
            ImageOps.exif_transpose(image, in_place=True)
            image = to_8_bits(image, channels, WHITE)
        image = image.convert(_MODES[channels])
        if crop != "none":
            image = cropped(image, crop, size)
        return np.asarray(image).reshape(image.height, -1, channels)


def cropped(image: Image.Image, crop: str, size: tuple[int, int]) -> Image.Image:
    """A named part of an image, resized without aliasing.

    center: the largest central part of the shape of `size`, its corner rounded down to a whole
      pixel, and Pillow's Lanczos filter.
    celeba: of an aligned image of CelebA, the 128x128 square round (x 89, y 121): columns 25 to
      152, rows 57 to 184. With Pillow's bilinear filter, which is widened when it shrinks an image,
      these are the pixels of DDIM and U-ViT, who crop so and call torchvision's Resize.

    Args:
      image: an 8-bit image.
      crop: "center" or "celeba".
      size: (height, width) of the result.

    Raises:
      ValueError: for "celeba", if the image is not 178 pixels wide and 218 high.
    """
    height, width = size
    if crop == "celeba":
        if image.size != CELEBA_SIZE:
            raise ValueError(
                f"it is {image.width} pixels wide and {image.height} high, but crop celeba is for "
                "the aligned images of CelebA, 178 wide and 218 high"
            )
        box, resample = (25, 57, 153, 185), Image.Resampling.BILINEAR
    else:
        scale = min(image.width / width, image.height / height)
        wide, high = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (image.width - wide) // 2, (image.height - high) // 2
        box, resample = (left, top, left + wide, top + high), Image.Resampling.LANCZOS
    return image.crop(box).resize((width, height), resample)


def cropped_array(image_HWC: np.ndarray, crop: str, size: tuple[int, int]) -> np.ndarray:
    """`cropped` for the uint8 pixels [H, W, C] of an image; each channel by itself."""
    channels = (Image.fromarray(channel) for channel in np.moveaxis(image_HWC, -1, 0))
    return np.stack([np.asarray(cropped(channel, crop, size)) for channel in channels], axis=-1)


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


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image once it is upright."""
    turned = image.getexif().get(0x0112, 1) >= 5
    return image.size if turned else image.size[::-1]


def is_grey(image: Image.Image) -> bool:
    """Whether an image has no colours, whatever their values."""
    return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")


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
