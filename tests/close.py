"""How close a computed value must be to the expected one, relative to the expected values."""

import jax
import numpy as np


def assert_close(actual, expected, tolerance):
    """Asserts that no |actual - expected| exceeds `tolerance` times the largest |expected|.

    In trees, this holds for each leaf separately. The tolerance is relative to the largest entry,
    not to each one, because the rounding of a sum depends on the size of its terms, even if they
    cancel.
    """

    def check(actual, expected):
        expected = np.asarray(expected, np.float64)
        assert np.isfinite(expected).all(), expected
        atol = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)

    jax.tree.map(check, actual, expected)
