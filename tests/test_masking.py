import types

import jax
import numpy as np
import pytest

from maskdm_jax.model import masking


def mask(kind, ratio=0.9, block_size=1, crop_size=1):
    return types.SimpleNamespace(kind=kind, ratio=ratio, block_size=block_size, crop_size=crop_size)


@pytest.mark.parametrize(
    "given, grid, expected",
    [
        (mask("block", 0.9, 4), (64, 64), 416),  # int(0.9 * 4096) // 16 = 230 of 256 blocks hidden
        (mask("patch", 0.9), (64, 64), 410),
        (mask("patch", 0.9), (8, 8), 7),
        (mask("block", 0.5, 2), (16, 16), 128),
        (mask("block", 0.9, 8), (16, 16), 64),
        (mask("crop", crop_size=3), (8, 8), 9),
        (mask("patch", 0.29), (10, 10), 72),  # 0.29 * 100 is 28.999... in floating point
        (mask("patch", 0.0), (4, 6), 24),
        (mask("none"), (4, 6), 24),
    ],
)
def test_visible_counts_follow_the_official_rules(given, grid, expected):
    assert masking.num_visible(given, grid) == expected
    ids = masking.draw_visible_ids(jax.random.key(0), 5, given, grid)
    assert (ids is None) if given.kind == "none" else (ids.shape == (5, expected))


CROP = mask("crop", crop_size=3)


@pytest.mark.parametrize("given", [mask("patch", 0.5), mask("block", 0.6, 2), CROP])
def test_ids_ascend_without_repeats_inside_the_grid(given):
    ids = np.asarray(masking.draw_visible_ids(jax.random.key(1), 64, given, (6, 8)))
    assert (np.diff(ids, axis=1) > 0).all()
    assert ids.min() >= 0 and ids.max() < 48


def test_block_masks_keep_whole_aligned_blocks():
    ids = np.asarray(masking.draw_visible_ids(jax.random.key(2), 16, mask("block", 0.5, 2), (6, 8)))
    for row in ids:
        shown = np.zeros(48, bool)
        shown[row] = True
        blocks = shown.reshape(3, 2, 4, 2).sum(axis=(1, 3))
        assert set(blocks.ravel()) <= {0, 4}


def test_crop_masks_keep_one_square_window():
    ids = np.asarray(masking.draw_visible_ids(jax.random.key(3), 200, CROP, (5, 7)))
    rows, cols = np.divmod(ids, 7)
    assert (np.ptp(rows, axis=1) == 2).all() and (np.ptp(cols, axis=1) == 2).all()
    assert set(rows[:, 0]) == {0, 1, 2} and set(cols[:, 0]) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("given", [mask("patch", 0.75), mask("block", 0.75, 2)])
def test_every_patch_is_visible_equally_often(given):
    draws = 4000
    ids = np.asarray(masking.draw_visible_ids(jax.random.key(4), draws, given, (4, 8)))
    frequency = np.bincount(ids.ravel(), minlength=32) / draws
    # Four standard errors of a share of 0.25 over the draws.
    np.testing.assert_allclose(frequency, 0.25, atol=4 * (0.25 * 0.75 / draws) ** 0.5)


def test_images_of_a_batch_have_different_masks():
    ids = np.asarray(masking.draw_visible_ids(jax.random.key(5), 8, mask("patch", 0.5), (8, 8)))
    assert len({tuple(row) for row in ids}) == 8
