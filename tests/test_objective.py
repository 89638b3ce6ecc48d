import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from maskdm_jax import diffusion, objective, patches, uvit

COSINE = types.SimpleNamespace(schedule="cosine", num_timesteps=1000)
ABAR = diffusion.make_alphas_cumprod(COSINE, (32, 32))


@pytest.mark.parametrize("kind", ["block", "patch", "crop", "full"])
def test_losses_equal_the_official_ones(golden, official_model, kind):
    model, params = official_model
    x0, eps = (
        patches.patchify(np.moveaxis(array, 1, -1), 4)
        for array in (2 * golden["image"] - 1, golden["noise"])
    )
    visible, expected = None, golden["loss_full_paper_mean"]
    if kind != "full":
        visible = np.stack([np.flatnonzero(~row) for row in golden[f"mask_{kind}"]])
        x0, eps = (objective.gather_visible(x, visible) for x in (x0, eps))
        expected = golden[f"loss_{kind}"]
    loss = objective.denoising_loss(model, params, x0, eps, golden["t"], ABAR, visible_BV=visible)
    assert_close(loss, expected, 1e-5)


@pytest.fixture(scope="module")
def small():
    model = uvit.UViT(num_patches=8, patch_dim=4, width=16, depth=3, num_heads=2)
    generator = np.random.default_rng(0)
    x0, eps = generator.normal(size=(2, 3, 8, 4)).astype(np.float32)
    t = jnp.asarray([10, 500, 900])
    return model, uvit.init_params(model, jax.random.key(0)), x0, eps, t


def test_hidden_patches_get_zero_gradient(small):
    model, params, x0, eps, t = small
    visible = jnp.asarray([[0, 3], [1, 2], [6, 7]])

    def loss(x0):
        return objective.denoising_loss(
            model,
            params,
            objective.gather_visible(x0, visible),
            objective.gather_visible(eps, visible),
            t,
            ABAR,
            visible_BV=visible,
        )

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(x0)))
    shown = np.zeros((3, 8), bool)
    np.put_along_axis(shown, np.asarray(visible), True, axis=1)
    assert (gradient[~shown] == 0).all()
    assert (np.abs(gradient[shown]).max(axis=-1) > 0).all()


def test_masked_loss_with_nothing_hidden_is_the_full_loss(small):
    model, params, x0, eps, t = small
    ids = jnp.tile(jnp.arange(8), (3, 1))
    masked = objective.denoising_loss(model, params, x0, eps, t, ABAR, visible_BV=ids)
    full = objective.denoising_loss(model, params, x0, eps, t, ABAR)
    np.testing.assert_allclose(masked, full, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_loss_compares_the_output_with_the_chosen_target(small, prediction, norm):
    model, params, x0, eps, t = small
    signal, noise = diffusion.signal_and_noise(ABAR, t, 3)
    output = uvit.apply(model, params, diffusion.q_sample(x0, eps, signal, noise), t)
    targets = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}
    error = np.asarray(output - targets[prediction])
    expected = (error**2).mean() if norm == "l2" else np.abs(error).mean()
    loss = objective.denoising_loss(
        model, params, x0, eps, t, ABAR, prediction=prediction, norm=norm
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
