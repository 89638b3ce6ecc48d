"""How near a computed value has to be to the expected one, whatever the size of both."""

import jax
import numpy as np


def assert_close(actual, expected, tolerance):
    """Asserts that no |actual - expected| exceeds `tolerance` times the largest |expected|.

    In trees, this holds for each leaf on its own. The measure is the largest and not each entry,
    because a sum is rounded by the size of its terms, also where they cancel.
    """

    def check(actual, expected):
        expected = np.asarray(expected, np.float64)
        assert np.isfinite(expected).all(), expected
        atol = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)

    jax.tree.map(check, actual, expected)
