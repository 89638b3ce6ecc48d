"""The Kernel Inception Distance (Binkowski et al. 2018, "Demystifying MMD GANs").

The squared maximum mean discrepancy between two sets of features under the polynomial kernel
k(x, y) = (x . y / D + 1)^3, by its unbiased estimator. Unlike FID its expectation does not depend
on the number of images; for two samples of one distribution it is 0, and single values may be
negative.
"""

import numpy as np

SUBSET_SIZE = 1000
NUM_SUBSETS = 100


def kid(x_ND: np.ndarray, y_ND: np.ndarray, seed: int = 0) -> dict[str, float]:
    """KID of features [N, D] and [M, D], as the mean over random subsets of both.

    A subset has SUBSET_SIZE images, or as many as the smaller set. If that is all of both sets, one
    subset is enough.

    Returns:
      "kid", and "kid_error", its standard error over the subsets if there are several. Subsets of
      most of a set overlap, so their error is too small.
    """
    size = min(SUBSET_SIZE, len(x_ND), len(y_ND))
    num_subsets = 1 if size == len(x_ND) == len(y_ND) else NUM_SUBSETS
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        x, y = (
            np.asarray(z[generator.choice(len(z), size, replace=False)], np.float64)
            for z in (x_ND, y_ND)
        )
        values.append(squared_mmd(x, y))
    found = {"kid": float(np.mean(values))}
    if num_subsets > 1:
        found["kid_error"] = float(np.std(values, ddof=1) / num_subsets**0.5)
    return found


def squared_mmd(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """Unbiased squared MMD of two sets of equal size, at least 2; float64."""
    n, dims = x_ND.shape

    def within(z):  # mean over pairs of different rows
        kernel = (z @ z.T / dims + 1) ** 3
        return (kernel.sum() - np.trace(kernel)) / (n * (n - 1))

    between = ((x_ND @ y_ND.T / dims + 1) ** 3).mean()
    return float(within(x_ND) + within(y_ND) - 2 * between)
