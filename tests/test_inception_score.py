import numpy as np
import pytest

from maskdm_jax.quality.inception_score import inception_score


def test_images_of_k_clear_and_equally_frequent_classes_score_k():
    logits = np.tile(50 * np.eye(5), (40, 1))
    found = inception_score(logits)
    assert found["inception_score"] == pytest.approx(5, rel=0.2)  # parts are not quite balanced
    assert inception_score(np.repeat(logits, 100, axis=0))["inception_score"] == pytest.approx(
        5, rel=2e-3
    )


def test_images_that_all_look_alike_score_1():
    logits = np.tile(np.random.default_rng(0).normal(size=7), (20, 1)) + 1000
    found = inception_score(logits)
    assert found["inception_score"] == pytest.approx(1)
    assert found["inception_score_std"] == pytest.approx(0, abs=1e-9)


def test_a_set_sorted_by_class_scores_like_a_shuffled_one():
    by_class = np.repeat(50 * np.eye(10), 100, axis=0)
    assert inception_score(by_class)["inception_score"] > 9


def test_one_split_is_the_exponential_of_the_mutual_information(monkeypatch):
    monkeypatch.setattr("maskdm_jax.quality.inception_score.NUM_SPLITS", 1)
    p = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    q = p.mean(axis=0)
    expected = np.exp(np.mean([sum(r * np.log(r / q)) for r in p]))
    assert inception_score(np.log(p) + 3)["inception_score"] == pytest.approx(expected)
