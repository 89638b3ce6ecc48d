import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax.model import patches


@pytest.mark.parametrize("channels", [1, 3, 12])
def test_unpatchify_inverts_patchify_on_a_rectangular_grid(channels):
    image = np.random.default_rng(0).normal(size=(2, 8, 12, channels)).astype(np.float32)
    tokens = patches.patchify(jnp.asarray(image), 4)
    assert tokens.shape == (2, 6, 16 * channels)
    np.testing.assert_array_equal(patches.unpatchify(tokens, 4, (8, 12)), image)


def test_patches_are_row_major_and_their_pixels_row_column_channel():
    image = np.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    tokens = np.asarray(patches.patchify(jnp.asarray(image), 2))
    np.testing.assert_array_equal(tokens[0, 4], image[0, 2:4, 2:4].reshape(-1))
