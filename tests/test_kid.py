"""KID against its definition as a double sum, and against its expectation."""

import numpy as np
import pytest

from maskdm_jax.quality import kid


def test_squared_mmd_is_the_double_sum_of_its_definition():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 6, 3))
    y = y + 1

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = (
        np.mean([kernel(x[i], x[j]) for i, j in pairs])
        + np.mean([kernel(y[i], y[j]) for i, j in pairs])
        - 2 * np.mean([kernel(a, b) for a in x for b in y])
    )
    assert kid.squared_mmd(x, y) == pytest.approx(expected)


def test_kid_of_two_samples_of_one_distribution_is_0_within_its_spread():
    values = []
    for seed in range(40):
        x, y = np.random.default_rng(seed).normal(size=(2, 60, 4))
        values.append(kid.kid(x, y)["kid"])
    assert abs(np.mean(values)) < 3 * np.std(values) / len(values) ** 0.5
    assert min(values) < 0  # unbiased, so some are negative


def test_kid_grows_with_a_shift():
    x, y = np.random.default_rng(0).normal(size=(2, 300, 4))
    small, large = (kid.kid(x, y + shift)["kid"] for shift in (0.5, 1.0))
    assert 0.05 < small < large


def test_sets_of_unequal_size_are_compared_in_subsets_of_the_smaller_size(monkeypatch):
    monkeypatch.setattr(kid, "SUBSET_SIZE", 50)
    x, y = (np.random.default_rng(s).normal(size=(n, 4)) for s, n in ((0, 80), (1, 30)))
    found = kid.kid(x, y + 1)
    assert found == kid.kid(x, y + 1)  # the subsets are the same each time
    assert found["kid_error"] > 0 and found["kid"] > 10 * found["kid_error"]
    assert "kid_error" not in kid.kid(x[:30], y)
