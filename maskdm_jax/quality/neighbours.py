"""Scores from nearest neighbours in feature space: what looks real, is covered, or is copied.

A ball round an image reaches to its k-th nearest neighbour, so the values depend on the number of
images; both sets should have the same. Distances are Euclidean and computed for a chunk of rows at
a time, which bounds the memory.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.errors import ConfigError

PRECISION_K = 3
DENSITY_K = 5
NEAREST_SHARE = 0.01
_CHUNK = 1024


def precision_recall(samples_ND: np.ndarray, reference_MD: np.ndarray) -> dict[str, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), with k = PRECISION_K.

    Precision is the share of samples within the ball of some reference image, recall the share of
    reference images within the ball of some sample. The paper's features are those of VGG-16, so
    its values are not comparable with these.
    """
    samples, reference = _around(reference_MD, samples_ND, reference_MD)
    return {
        "precision": float(np.mean(_num_balls(samples, reference, PRECISION_K) > 0)),
        "recall": float(np.mean(_num_balls(reference, samples, PRECISION_K) > 0)),
    }


def density_coverage(samples_ND: np.ndarray, reference_MD: np.ndarray) -> dict[str, float]:
    """Density and coverage (Naeem et al. 2020), with k = DENSITY_K.

    Only reference images have balls, so an outlier among the samples does no harm. Density is the
    mean number of balls that a sample lies in, over k; it may exceed 1. Coverage is the share of
    balls that hold a sample.
    """
    samples, reference = _around(reference_MD, samples_ND, reference_MD)
    nearest_M = np.concatenate([d.min(axis=1) for d in _squared_distances(reference, samples)])
    return {
        "density": float(np.mean(_num_balls(samples, reference, DENSITY_K)) / DENSITY_K),
        "coverage": float(np.mean(nearest_M <= _squared_radii(reference, DENSITY_K))),
    }


def memorisation(
    samples_ND: np.ndarray, training_MD: np.ndarray, heldout_HD: np.ndarray
) -> dict[str, float]:
    """Whether samples are nearer to training images than new images of the same kind are.

    The new images are the held-out ones. Meehan et al. (2020, "A Non-Parametric Test to Detect
    Data-Copying in Generative Models") compare the same distances, by a rank test.

    Returns:
      "memorisation_ratio": the median distance of a sample to its nearest training image, over that
        of a held-out image: about 1 if nothing is copied, lower if samples are drawn towards
        training images;
      "memorisation_share": the share of samples that are nearer than the nearest NEAREST_SHARE of
        the held-out images: about NEAREST_SHARE if nothing is copied; a few copies show here.

    Raises:
      ConfigError: if most held-out images are training images.
    """
    heldout_H = unseen_distances(training_MD, heldout_HD)
    sample_N = _nearest(*_around(training_MD, samples_ND, training_MD))
    limit = np.quantile(heldout_H, NEAREST_SHARE)
    return {
        "memorisation_ratio": float(np.median(sample_N) / np.median(heldout_H)),
        "memorisation_share": float(np.mean(sample_N < limit)),
    }


def unseen_distances(training_MD: np.ndarray, heldout_HD: np.ndarray) -> np.ndarray:
    """The distances of held-out images to their nearest training images, [H].

    Raises:
      ConfigError: if most held-out images are training images.
    """
    heldout_H = _nearest(*_around(training_MD, heldout_HD, training_MD))
    if np.median(heldout_H) == 0:
        raise ConfigError(
            "most held-out images are also training images; expected images that the model has "
            "not seen; type another --heldout, or in a run another --config.eval.heldout_split"
        )
    return heldout_H


def _around(origin_ND, *sets):
    """`sets` relative to the mean of the first: distances of shorter vectors keep more digits."""
    mean_D = origin_ND.mean(axis=0, dtype=np.float64)
    return [np.asarray(x - mean_D, np.float32) for x in sets]


@jax.jit
def _squared_distances_of(x_BD, y_MD):
    product_BM = jnp.matmul(x_BD, y_MD.T, precision="highest")
    squares = (x_BD**2).sum(axis=1)[:, None] + (y_MD**2).sum(axis=1)
    return jnp.maximum(squares - 2 * product_BM, 0)


def _squared_distances(x_ND, y_MD) -> Iterator[np.ndarray]:
    """Squared distances of each row of x to all of y, a chunk of rows [B, M] at a time."""
    y_MD = jax.device_put(y_MD)
    for first in range(0, len(x_ND), _CHUNK):
        chunk = x_ND[first : first + _CHUNK]
        # Padded, since XLA takes 10 s on a GPU to compile this for another number of rows.
        padded = np.pad(chunk, ((0, _CHUNK - len(chunk)), (0, 0)))
        yield np.array(_squared_distances_of(padded, y_MD))[: len(chunk)]


def _squared_radii(x_ND, k):
    """Squared distance of each row to its k-th nearest neighbour among the others, [N]."""
    radii = []
    for chunk in _squared_distances(x_ND, x_ND):
        first = sum(map(len, radii))
        rows = np.arange(len(chunk))
        chunk[rows, first + rows] = np.inf  # no image is its own neighbour
        radii.append(np.partition(chunk, k - 1, axis=1)[:, k - 1])
    return np.concatenate(radii)


def _num_balls(x_ND, y_MD, k):
    """In how many of y's balls each row of x lies, [N]."""
    radius_M = _squared_radii(y_MD, k)
    return np.concatenate([(d <= radius_M).sum(axis=1) for d in _squared_distances(x_ND, y_MD)])


def _nearest(x_ND, y_MD):
    """Distance of each row to its nearest neighbour in y, [N]; exactly 0 for a copy."""
    nearest = np.concatenate([d.argmin(axis=1) for d in _squared_distances(x_ND, y_MD)])
    return np.linalg.norm(x_ND - y_MD[nearest], axis=1)
