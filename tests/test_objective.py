import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from maskdm_jax.diffusion import make_process, objective
from maskdm_jax.model import patches, uvit


def ddpm(prediction="eps"):
    settings = types.SimpleNamespace(
        framework="ddpm", schedule="cosine", num_timesteps=1000, prediction=prediction
    )
    return make_process(settings, (32, 32))


def loss_of(model, params, x0, eps, t, visible_BV=None, process=None, norm="l2"):
    def predict(x_BVP, time_B):
        return uvit.apply(model, params, x_BVP, time_B, visible_BV=visible_BV)

    return objective.denoising_loss(predict, process or ddpm(), x0, eps, t, norm)


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
        x0, eps = (patches.gather(x, visible) for x in (x0, eps))
        expected = golden[f"loss_{kind}"]
    loss_B = loss_of(model, params, x0, eps, golden["t"], visible)
    assert loss_B.shape == golden["t"].shape
    assert_close(loss_B.mean(), expected, 1e-5)


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
        given = (patches.gather(x, visible) for x in (x0, eps))
        return loss_of(model, params, *given, t, visible).mean()

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(x0)))
    shown = np.zeros((3, 8), bool)
    np.put_along_axis(shown, np.asarray(visible), True, axis=1)
    assert (gradient[~shown] == 0).all()
    assert (np.abs(gradient[shown]).max(axis=-1) > 0).all()


def test_masked_loss_with_nothing_hidden_is_the_full_loss(small):
    ids = jnp.tile(jnp.arange(8), (3, 1))
    assert_close(loss_of(*small, visible_BV=ids), loss_of(*small), 1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_loss_compares_the_output_with_the_chosen_target(small, prediction, norm):
    model, params, x0, eps, t = small
    level = ddpm(prediction).at(t)
    signal, noise = (x[:, None, None] for x in (level.signal, level.noise))
    output = uvit.apply(model, params, signal * x0 + noise * eps, t)
    targets = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}
    error = np.asarray(output - targets[prediction])
    expected = (error**2 if norm == "l2" else np.abs(error)).mean((1, 2))
    loss_B = loss_of(*small, process=ddpm(prediction), norm=norm)
    assert_close(loss_B, expected, 1e-5)


def test_the_plain_loss_with_edms_levels_is_edms_weighted_loss(small):
    from test_samplers import edm

    model, params, x0, eps, _ = small
    sigma = jnp.asarray([0.02, 0.5, 20.0])
    level = edm().at(sigma)
    output = uvit.apply(
        model, params, level.scale[:, None, None] * (x0 + sigma[:, None, None] * eps), level.time
    )
    # Karras et al. 2022, equation 7, with sigma_data 0.5: denoiser, then weight.
    s = sigma[:, None, None]
    skip, out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25) ** 0.5
    denoised = skip * (x0 + s * eps) + out * output
    weight = (s**2 + 0.25) / (s * 0.5) ** 2
    expected = (weight * (denoised - x0) ** 2).mean((1, 2))
    loss_B = loss_of(model, params, x0, eps, sigma, process=edm())
    assert_close(loss_B, expected, 1e-4)
