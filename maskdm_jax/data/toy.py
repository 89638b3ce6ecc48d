"""A 2-D swiss roll: points of a plane as images of 1x2 pixels, the smallest case of the method.

The two coordinates are two patches of one pixel each, so hiding half of them hides one coordinate.
They are stored as all images are, in 8 bits: 0 to 255 are -1 to 1, in steps of 0.008.
"""

import pathlib

import numpy as np

from maskdm_jax.data.image_set import ImageSet, ids_by_index

NAME = "swiss_roll"
_SIZES = {"train": 50_000, "test": 10_000}
_NOISE = 0.02  # standard deviation across the roll, whose coils are 0.4 apart


def points(split: str) -> np.ndarray:
    """The points of a split, float64 [N, 2] between -1 and 1.

    Along the roll the angle is uniform between 1.5 pi and 4.5 pi, and the radius is proportional
    to it.
    """
    generator = np.random.default_rng(list(_SIZES).index(split))
    angle = np.pi * generator.uniform(1.5, 4.5, _SIZES[split])
    roll = np.stack([np.cos(angle), np.sin(angle)], axis=1) * angle[:, None] / (4.5 * np.pi)
    return np.clip(0.93 * roll + _NOISE * generator.standard_normal(roll.shape), -1, 1)


def to_pixels(points: np.ndarray) -> np.ndarray:
    """Points [N, 2] as images, uint8 [N, 1, 2, 1]."""
    return np.rint((points + 1) * 127.5).astype(np.uint8).reshape(-1, 1, 2, 1)


def to_points(images: np.ndarray) -> np.ndarray:
    """Images, uint8 [N, 1, 2, 1], as points [N, 2]."""
    return images.reshape(-1, 2) / 127.5 - 1


class _Records:
    def __init__(self, split: str):
        self._images = to_pixels(points(split))

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return {"image": self._images[index]}

    def ids(self):
        return ids_by_index(len(self))

    def name(self, index):
        return f"point {index} of the swiss roll"


def open_swiss_roll(cache_dir: pathlib.Path) -> ImageSet:
    """The swiss roll, drawn afresh at each start; its points are the same every time."""
    return ImageSet(
        splits={split: lambda split=split: _Records(split) for split in _SIZES},
        image_shape=(1, 2, 1),
        num_classes=0,
        cache_dir=cache_dir,
        remedy="this is an error of the program",
    )
