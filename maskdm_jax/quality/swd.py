"""Sliced Wasserstein distance between two sets of images, which needs no network.

As in section 5 of Karras et al. (2018, "Progressive Growing of GANs"): each image becomes a
Laplacian pyramid, down to 16 pixels. On each level, random patches of PATCH x PATCH pixels are
compared by the distance of their projections onto random directions. Fine levels see texture and
noise, coarse ones shapes. The patches of each set are normalized by their own mean and deviation
per channel, so a colour cast of the whole set is not seen.
"""

import concurrent.futures

import numpy as np

PATCH = 7
PATCHES_PER_IMAGE = 128
NUM_DIRECTIONS = 512
MAX_IMAGES = 16384

_COARSEST = 16
_FILTER = np.array([1, 4, 6, 4, 1], np.float32) / 16
_AT_ONCE = 16  # directions
_NUM_THREADS = 4  # NumPy sorts without the interpreter's lock; each thread holds its projections


def swd(a_NHWC: np.ndarray, b_NHWC: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Distances times 1,000, as in the paper, of uint8 images with sides of at least PATCH pixels.

    The larger set is cut to the size of the smaller one at random, and both to MAX_IMAGES. The
    places of the patches are the same in both, so two equal sets give 0.

    Returns:
      "swd", the mean over the levels, and "swd_64" and so on by the height of the level.
    """
    count = min(len(a_NHWC), len(b_NHWC), MAX_IMAGES)
    levels = [_pyramid(_chosen(x, count, seed)) for x in (a_NHWC, b_NHWC)]
    found = {}
    for a, b in zip(*levels, strict=True):
        distance = sliced_wasserstein(_patches(a, seed), _patches(b, seed), NUM_DIRECTIONS, seed)
        found[f"swd_{a.shape[1]}"] = 1e3 * distance
    return {"swd": float(np.mean(list(found.values()))), **found}


def sliced_wasserstein(
    a_ND: np.ndarray, b_ND: np.ndarray, num_directions: int, seed: int = 0
) -> float:
    """Mean Wasserstein-1 distance of two sets of points over random one-dimensional projections.

    Both sets have the same number of points; along a line, the optimal transport between them pairs
    the points in their order.
    """
    directions = np.random.default_rng(seed).normal(size=(a_ND.shape[1], num_directions))
    directions = (directions / np.linalg.norm(directions, axis=0)).astype(np.float32)

    def along(first):
        some = directions[:, first : first + _AT_ONCE]
        a, b = (np.sort((x @ some).T) for x in (a_ND, b_ND))
        return float(np.abs(a - b).mean(axis=1, dtype=np.float64).sum())

    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as threads:
        return sum(threads.map(along, range(0, num_directions, _AT_ONCE))) / num_directions


def _chosen(images, count, seed):
    if len(images) == count:
        return images
    index = np.random.default_rng(seed).choice(len(images), count, replace=False)
    return images[np.sort(index)]


def _pyramid(images_NHWC):
    """Differences between successive halvings, and the coarsest image: float32, finest first."""
    levels = [images_NHWC.astype(np.float32)]
    while all(s % 2 == 0 and s // 2 >= _COARSEST for s in levels[-1].shape[1:3]):
        fine = levels[-1]
        coarse = _blurred(fine)[:, ::2, ::2]
        spread = np.zeros_like(fine)
        spread[:, ::2, ::2] = coarse
        levels[-1] = fine - 4 * _blurred(spread)
        levels.append(coarse)
    return levels


def _blurred(images_NHWC):
    for axis in (1, 2):
        padding = [(2, 2) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(images_NHWC, padding, mode="reflect")
        size = images_NHWC.shape[axis]
        parts = (np.take(padded, range(i, i + size), axis) * w for i, w in enumerate(_FILTER))
        images_NHWC = sum(parts)
    return images_NHWC


def _patches(images_NHWC, seed):
    """Normalized patches as rows: float32 [N * PATCHES_PER_IMAGE, PATCH * PATCH * C]."""
    n, height, width, channels = images_NHWC.shape
    generator = np.random.default_rng(seed)
    shape = (n, PATCHES_PER_IMAGE)
    top = generator.integers(height - PATCH + 1, size=shape)
    left = generator.integers(width - PATCH + 1, size=shape)
    windows = np.lib.stride_tricks.sliding_window_view(images_NHWC, (PATCH, PATCH), axis=(1, 2))
    patches = windows[np.arange(n)[:, None], top, left]  # [N, patches, C, PATCH, PATCH]
    for c in range(channels):
        channel = patches[:, :, c]
        channel -= channel.mean(dtype=np.float64)
        channel /= max(channel.std(dtype=np.float64), np.finfo(np.float32).tiny)
    return patches.reshape(-1, PATCH * PATCH * channels)
