"""The Fréchet distance between two sets of features, and pytorch-fid's files of statistics.

Each set is summed up by the Gaussian N(mu, sigma) with its mean and covariance (Heusel et al. 2017,
"GANs Trained by a Two Time-Scale Update Rule"):

    distance = |mu_1 - mu_2|^2 + tr(sigma_1) + tr(sigma_2) - 2 tr((sigma_1 sigma_2)^(1/2))
"""

import json
import pathlib
import tokenize
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from maskdm_jax.errors import ConfigError
from maskdm_jax.run import files


class Moments(NamedTuple):
    """Sums over `count` feature vectors, in float64; see `add`."""

    count: int
    mean_D: np.ndarray
    scatter_DD: np.ndarray  # sum of outer products of the deviations from the mean


# What NumPy raises for an .npz that is empty, cut short or has flipped bits.
BAD_NPZ = (
    OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error,
    tokenize.TokenError,
)  # fmt: skip


class Statistics(NamedTuple):
    """Mean and covariance of a set's features.

    Fields:
      mu_D, sigma_DD: float64; sigma has n - 1 in its denominator, as np.cov.
      count: of images; None if the file does not tell.
      made_by: what the file tells of how it was made; empty for pytorch-fid's own files.
    """

    mu_D: np.ndarray
    sigma_DD: np.ndarray
    count: int | None = None
    made_by: dict = {}


def no_moments(dims: int) -> Moments:
    return Moments(0, np.zeros(dims), np.zeros((dims, dims)))


def add(moments: Moments, features_BD: np.ndarray) -> Moments:
    """Moments with a further batch of features [B, D], without loss of digits.

    The pairwise update of Chan, Golub & LeVeque (1983): no difference of large sums is taken.
    """
    x_BD = np.asarray(features_BD, np.float64)
    mean_D = x_BD.mean(axis=0)
    centred_BD = x_BD - mean_D
    return merge(moments, Moments(len(x_BD), mean_D, centred_BD.T @ centred_BD))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets, such as those of two processes."""
    count = a.count + b.count
    shift_D = b.mean_D - a.mean_D
    mean_D = a.mean_D + shift_D * (b.count / count)
    between_DD = np.outer(shift_D, shift_D) * (a.count * b.count / count)
    return Moments(count, mean_D, a.scatter_DD + b.scatter_DD + between_DD)


def statistics(moments: Moments) -> Statistics:
    """Mean and covariance of at least two feature vectors."""
    return Statistics(moments.mean_D, moments.scatter_DD / (moments.count - 1), moments.count)


def distance(a: Statistics, b: Statistics) -> float:
    """The (squared) Fréchet distance.

    tr((sigma_1 sigma_2)^(1/2)) is the sum of the singular values of sigma_1^(1/2) sigma_2^(1/2).
    From symmetric eigendecompositions and without a further square root, it keeps its digits for
    singular matrices too, which those of few images are: two equal sets give 0.
    """
    root_a, root_b = (_half_root(s.sigma_DD) for s in (a, b))
    overlap = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    shift_D = a.mu_D - b.mu_D
    value = shift_D @ shift_D + np.trace(a.sigma_DD) + np.trace(b.sigma_DD) - 2 * overlap
    return max(float(value), 0.0)


def _half_root(sigma_DD):
    """R with R R^T = sigma."""
    variances, axes_DD = np.linalg.eigh(sigma_DD)
    return axes_DD * np.sqrt(np.maximum(variances, 0))


def write(path: str | pathlib.Path, stats: Statistics) -> None:
    """Writes statistics as pytorch-fid reads them: an .npz of mu and sigma.

    Two further entries, which pytorch-fid ignores, hold `count` and `made_by`.
    """
    with files.whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez(
            file,
            mu=stats.mu_D,
            sigma=stats.sigma_DD,
            count=stats.count or 0,
            made_by=json.dumps(stats.made_by),
        )


def read(path: str | pathlib.Path) -> Statistics:
    """Reads statistics that `write` or `pytorch-fid --save-stats` wrote.

    Raises:
      ConfigError: if the file holds something else.
    """
    try:
        with np.load(path) as stored:
            mu_D, sigma_DD = (np.asarray(stored[k], np.float64) for k in ("mu", "sigma"))
            count = int(stored["count"]) if "count" in stored else 0
            made_by = dict(json.loads(str(stored["made_by"]))) if "made_by" in stored else {}
    except (KeyError, TypeError, *BAD_NPZ) as error:  # a file of one array is no context
        raise ConfigError(
            f"{path} holds no statistics; expected an .npz with mu and sigma, as pytorch-fid's "
            "--save-stats or --save_reference writes it"
        ) from error
    finite = np.isfinite(mu_D).all() and np.isfinite(sigma_DD).all()
    if mu_D.ndim != 1 or sigma_DD.shape != 2 * mu_D.shape or not finite:
        raise ConfigError(
            f"{path} holds mu {list(mu_D.shape)} and sigma {list(sigma_DD.shape)}; expected finite "
            "[D] and [D, D]; make the statistics again"
        )
    return Statistics(mu_D, sigma_DD, count or None, made_by)
