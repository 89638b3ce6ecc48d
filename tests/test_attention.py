import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax.attention import attend


@pytest.mark.parametrize("length", [5, 17, 417])
def test_attend_is_softmax_attention(length):
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, length, 4, 16)).astype(np.float32)
    scores = np.einsum("blkh,bmkh->bklm", q, k) / 4
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bklm,bmkh->blkh", weights, v)
    ours = jax.jit(attend)(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_an_unknown_implementation_is_named():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="'flashy'"):
        attend(x, x, x, "flashy")
