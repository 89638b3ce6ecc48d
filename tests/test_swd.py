"""Sliced Wasserstein distance: its pyramid, its patches, and what it sees."""

import numpy as np
import pytest
from close import assert_close
from scipy import ndimage

from maskdm_jax.quality import swd


@pytest.fixture
def images():
    # Smooth noise: neighbouring pixels are alike, as in photographs.
    noise = np.random.default_rng(0).normal(size=(60, 32, 32, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 0))
    return np.clip(128 + 150 * smooth / smooth.std() / 3, 0, 255).astype(np.uint8)


def test_in_one_dimension_it_is_the_mean_gap_between_sorted_points():
    a, b = np.array([[3.0], [1.0], [2.0]]), np.array([[2.0], [4.5], [3.0]])
    assert swd.sliced_wasserstein(a, b, 3) == pytest.approx((1 + 1 + 1.5) / 3)


def test_of_a_shift_it_is_the_mean_length_of_its_projections():
    a = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)
    # The mean of |cos| over the circle is 2 / pi.
    assert swd.sliced_wasserstein(a, a + [0, 3], 2000) == pytest.approx(3 * 2 / np.pi, rel=0.03)


def test_the_pyramid_adds_up_to_the_image(images):
    fine, coarse = swd._pyramid(images)
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])[None, :, :, None] / 256
    blurred = ndimage.convolve(images.astype(np.float64), kernel, mode="mirror")
    assert_close(coarse, blurred[:, ::2, ::2], 1e-6)
    spread = np.zeros_like(blurred)
    spread[:, ::2, ::2] = coarse
    assert_close(fine + ndimage.convolve(spread, 4 * kernel, mode="mirror"), images, 1e-6)


def test_patches_are_windows_of_the_images_normalized_per_channel():
    ramp = np.arange(9 * 9, dtype=np.float32).reshape(9, 9)
    images = np.stack([ramp, 3 * ramp + 50], axis=-1) + np.array([0, 1000])[:, None, None, None]
    patches = swd._patches(images.astype(np.float32), 0).reshape(-1, 2, 7, 7)
    assert len(patches) == 2 * swd.PATCHES_PER_IMAGE
    for channel in (patches[:, 0], patches[:, 1]):
        assert abs(channel.mean()) < 1e-4 and channel.std() == pytest.approx(1, rel=1e-4)
        from_corner = channel - channel[:, :1, :1]
        assert_close(from_corner, np.broadcast_to(from_corner[0], channel.shape), 1e-3)
        assert_close(from_corner[0] / from_corner[0, 0, 1], ramp[:7, :7], 1e-3)
        corners = np.unique(np.round(channel[:, 0, 0] / from_corner[0, 0, 1]))
        assert len(corners) == 2 * 3 * 3  # each place in each image


def test_equal_sets_have_distance_0(images):
    assert swd.swd(images, images)["swd"] == 0


def test_noise_shows_on_the_fine_level_alone(images):
    generator = np.random.default_rng(1)
    half, other = images[:30], images[30:]
    noisy = np.clip(other + generator.normal(size=other.shape) * 40, 0, 255).astype(np.uint8)
    floor, found = swd.swd(other, half), swd.swd(noisy, half)
    assert set(found) == {"swd", "swd_32", "swd_16"}
    assert found["swd_32"] > 2 * floor["swd_32"] and found["swd_16"] < 1.5 * floor["swd_16"]
    assert found["swd"] == pytest.approx((found["swd_32"] + found["swd_16"]) / 2)


def test_the_larger_set_is_cut_and_small_images_have_one_level(images):
    small = images[:, :8, :8, :1]
    assert set(swd.swd(small, small[:20])) == {"swd", "swd_8"}


def test_a_constant_channel_gives_a_finite_distance(images):
    flat = images.copy()
    flat[..., 0] = 7
    assert np.isfinite(swd.swd(flat, images)["swd"])
