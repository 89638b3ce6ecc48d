import numpy as np
import pytest

from maskdm_jax import images


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_round_trip(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    images.save_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(images.read_png(tmp_path / "a.png", channels), image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_grid_places_images_row_by_row():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    picture = images.grid(pictures, scale=2)
    assert picture.shape == (2 * 5 + 1, 3 * 7 + 1, 1)
    assert picture[1, 1, 0] == 0 and picture[1, 8, 0] == 1 and picture[6, 1, 0] == 3
    assert picture[0, 0, 0] == 255


def test_grid_has_a_whole_row_for_each_class_if_there_are_four_images_of_each():
    pictures = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 1), np.uint8)
    by_class = images.grid(pictures, num_classes=2)[1::2, 1::2, 0]
    assert by_class.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert images.grid(pictures, num_classes=3)[1::2, 1::2, 0].tolist()[0] == [0, 1, 2]
