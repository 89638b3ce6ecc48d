"""Scores of nearest neighbours against their definitions, written as plain loops."""

import numpy as np
import pytest

from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import neighbours


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(neighbours, "_CHUNK", 8)  # several chunks, the last one smaller


def distances(x, y):
    return np.linalg.norm(x[:, None].astype(np.float64) - y[None], axis=-1)


def radii(x, k):
    return np.sort(distances(x, x), axis=1)[:, k]  # entry 0 is the image itself


@pytest.fixture
def sets():
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(30, 5)).astype(np.float32) + 20
    samples = (0.7 * generator.normal(size=(21, 5)) + 20.5).astype(np.float32)
    return samples, reference


def test_precision_and_recall_are_shares_within_balls_of_the_third_neighbour(sets):
    samples, reference = sets
    d = distances(samples, reference)
    found = neighbours.precision_recall(samples, reference)
    assert found["precision"] == np.mean((d <= radii(reference, 3)).any(axis=1))
    assert found["recall"] == np.mean((d.T <= radii(samples, 3)).any(axis=1))
    assert 0 < found["recall"] < found["precision"] <= 1


def test_density_and_coverage_count_the_balls_of_the_fifth_neighbour(sets):
    samples, reference = sets
    inside = distances(samples, reference) <= radii(reference, 5)
    found = neighbours.density_coverage(samples, reference)
    assert found["density"] == pytest.approx(inside.sum() / (5 * len(samples)))
    assert found["coverage"] == np.mean(inside.any(axis=0))
    assert 0 < found["coverage"] < 1


def test_a_set_covers_itself(sets):
    _, reference = sets
    found = neighbours.precision_recall(reference, reference)
    found |= neighbours.density_coverage(reference, reference)
    assert found["precision"] == found["recall"] == found["coverage"] == 1


def test_memorisation_is_none_for_new_images_and_seen_for_copies():
    generator = np.random.default_rng(1)
    training, heldout, samples = generator.normal(size=(3, 400, 6)).astype(np.float32)
    fresh = neighbours.memorisation(samples, training, heldout)
    assert fresh["memorisation_ratio"] == pytest.approx(1, abs=0.1)
    assert fresh["memorisation_share"] < 0.03
    samples[:20] = training[:20]  # one image in 20 is a copy: the median hardly moves
    few = neighbours.memorisation(samples, training, heldout)
    assert few["memorisation_ratio"] == pytest.approx(1, abs=0.1)
    assert few["memorisation_share"] == pytest.approx(fresh["memorisation_share"] + 0.05, abs=0.005)
    near = training + 0.1 * samples
    assert neighbours.memorisation(near, training, heldout)["memorisation_ratio"] < 0.3


def test_memorisation_is_the_ratio_of_median_distances():
    training = np.zeros((2, 1), np.float32)
    samples, heldout = (np.array(x, np.float32)[:, None] for x in ([1, 2, 3], [4, 5, 6]))
    found = neighbours.memorisation(samples, training, heldout)
    assert found["memorisation_ratio"] == pytest.approx(2 / 5)
    assert found["memorisation_share"] == 1


def test_held_out_images_from_the_training_set_are_refused(sets):
    samples, training = sets
    with pytest.raises(ConfigError, match="type another --heldout"):
        neighbours.memorisation(samples, training, training[:9])
