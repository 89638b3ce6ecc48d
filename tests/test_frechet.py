"""Moments, the Fréchet distance against scipy, and files of statistics."""

import io

import numpy as np
import pytest
from close import assert_close
from scipy import linalg

from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import frechet


def features(n, dims, seed, shift=0.0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(dims, dims)) * 0.9 ** np.arange(dims)
    return (generator.normal(size=(n, dims)) @ mixing + shift).astype(np.float32)


def statistics(x_ND, batch=7):
    moments = frechet.no_moments(x_ND.shape[1])
    for first in range(0, len(x_ND), batch):
        moments = frechet.add(moments, x_ND[first : first + batch])
    return frechet.statistics(moments)


def test_streamed_moments_are_those_of_all_features_at_once():
    x = features(50, 6, 0, shift=1000)
    stats = statistics(x)
    assert stats.count == 50
    assert_close(stats.mu_D, x.astype(np.float64).mean(axis=0), 1e-14)
    assert_close(stats.sigma_DD, np.cov(x.astype(np.float64), rowvar=False), 1e-11)


def test_the_moments_of_two_processes_merge_into_those_of_all_images():
    x = features(50, 6, 0)
    a, b = (frechet.add(frechet.no_moments(6), part) for part in (x[:20], x[20:]))
    merged = frechet.statistics(frechet.merge(a, b))
    assert_close(merged.sigma_DD, statistics(x).sigma_DD, 1e-13)


@pytest.mark.parametrize("dims", [5, 64])
def test_the_distance_is_scipys(dims):
    a, b = statistics(features(300, dims, 0)), statistics(features(200, dims, 1, shift=0.5))
    root = linalg.sqrtm(a.sigma_DD @ b.sigma_DD).real
    shift = a.mu_D - b.mu_D
    expected = shift @ shift + np.trace(a.sigma_DD + b.sigma_DD - 2 * root)
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [20, 500])  # fewer and more images than features
def test_two_equal_sets_have_distance_0(n):
    stats = statistics(features(n, 64, 0))
    assert frechet.distance(stats, stats) < 1e-11 * np.trace(stats.sigma_DD)


def test_the_distance_of_commuting_gaussians_is_the_textbook_one():
    a = frechet.Statistics(np.zeros(3), np.diag([1.0, 4.0, 0.0]))
    b = frechet.Statistics(np.array([0.0, 0.0, 2.0]), np.diag([9.0, 4.0, 1.0]))
    assert frechet.distance(a, b) == pytest.approx(4 + (1 - 3) ** 2 + 0 + 1)


def test_written_statistics_are_read_back_and_are_pytorch_fids(tmp_path):
    path = tmp_path / "train.npz"
    stats = statistics(features(40, 8, 0))._replace(made_by={"features": 8})
    frechet.write(path, stats)
    back = frechet.read(path)
    assert back.count == 40 and back.made_by == {"features": 8}
    assert (back.sigma_DD == stats.sigma_DD).all() and (back.mu_D == stats.mu_D).all()
    with np.load(path) as file:  # the two entries that pytorch-fid reads
        assert (file["mu"] == stats.mu_D).all() and file["sigma"].shape == (8, 8)


def test_pytorch_fids_own_statistics_are_read(tmp_path):
    np.savez_compressed(tmp_path / "theirs.npz", mu=np.zeros(8), sigma=np.eye(8))
    stats = frechet.read(tmp_path / "theirs.npz")
    assert stats.count is None and stats.made_by == {} and stats.sigma_DD.shape == (8, 8)


@pytest.mark.parametrize(
    "content",
    [
        {"mu": np.zeros(8)},
        {"mu": np.zeros(8), "sigma": np.eye(7)},
        {"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)},
        {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
        {"mu": np.float64(0), "sigma": np.float64(1)},
        {"mu": np.zeros(2), "sigma": np.eye(2), "made_by": "[1]"},
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
    ],
)
def test_other_npz_files_are_refused_in_one_sentence(tmp_path, content):
    np.savez(tmp_path / "other.npz", **content)
    with pytest.raises(ConfigError, match="other.npz holds .*expected .*") as error:
        frechet.read(tmp_path / "other.npz")
    assert "\n" not in str(error.value)


def test_another_file_named_npz_is_refused(tmp_path):
    path, array = tmp_path / "other.npz", io.BytesIO()
    np.save(array, np.zeros(4))
    np.savez_compressed(path, mu=np.arange(8.0), sigma=np.eye(8))
    flipped = bytearray(path.read_bytes())
    flipped[60] ^= 255  # in the compressed numbers
    for content in (b"not an archive", b"", array.getvalue(), flipped):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="holds no statistics"):
            frechet.read(path)
