"""The Haar transform of tokens: its definition, and the network that it rotates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import textbook
from close import assert_close
from test_pooling import pooled_config
from test_step import curve

import maskdm_jax
from maskdm_jax import config as config_lib
from maskdm_jax import config_file, draw, flops, phases, sharding, state, step, train
from maskdm_jax.diffusion import make_process
from maskdm_jax.diffusion.objective import denoising_loss
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import patches, uvit


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def haar_image(x):
    """The textbook's one-level Haar transform, [B, H, W, C] to [B, H/2, W/2, 4C]: low-pass
    (a + b) / sqrt(2) and high-pass (a - b) / sqrt(2) along each row, then along each column."""

    def split(x, axis):
        even, odd = (np.take(x, range(start, x.shape[axis], 2), axis) for start in (0, 1))
        return (even + odd) / 2**0.5, (even - odd) / 2**0.5

    low, high = split(np.float64(x), 2)
    rows = split(low, 1), split(high, 1)
    return np.concatenate([rows[0][0], rows[1][0], rows[0][1], rows[1][1]], axis=-1)


@pytest.mark.parametrize("channels", [1, 3])
def test_tokens_are_patches_of_the_transformed_image(channels):
    image = pixels(2, 16, 24, channels)
    ours = patches.to_haar(patches.patchify(image, 8), 8)
    transformed = haar_image(image)
    assert transformed.shape == (2, 8, 12, 4 * channels)
    assert_close(ours, patches.patchify(transformed, 4), 1e-6)


@pytest.mark.parametrize("side, patch", [(256, 8), (512, 8), (512, 16), (6, 2)])
def test_the_round_trip_is_exact(side, patch):
    tokens = patches.patchify(jnp.asarray(pixels(1, side, side, 3)), patch)
    assert_close(patches.from_haar(patches.to_haar(tokens, patch), patch), tokens, 1e-6)
    assert_close(patches.to_haar(patches.from_haar(tokens, patch), patch), tokens, 1e-6)


def test_the_transform_is_orthogonal_so_noise_stays_white_and_squared_errors_the_same():
    matrix = np.asarray(patches.to_haar(jnp.eye(48)[None], 4)[0])
    assert_close(matrix @ matrix.T, np.eye(48), 1e-6)
    assert np.abs(matrix - np.eye(48)).max() > 0.4


def test_a_constant_image_has_a_mean_band_alone():
    bands = np.asarray(patches.to_haar(jnp.full((1, 1, 4 * 4 * 3), 0.5), 4)).reshape(2, 2, 4, 3)
    assert_close(bands[:, :, 0], np.ones((2, 2, 3)), 1e-6)  # 4 pixels of 0.5, over 2
    assert not bands[:, :, 1:].any()


# ------------------------------------------------------------------------------------- the network
def rotated(params, patch_size):
    """Weights with which a network on coefficients computes what `params` do on pixels."""

    def embed(kernel_PD):
        return patches.to_haar(kernel_PD.T[None], patch_size)[0].T

    def output(kernel):
        return patches.to_haar(kernel.reshape(1, -1, kernel.shape[-1]), patch_size).reshape(
            kernel.shape
        )

    def ends(tree):
        tree = dict(tree, patch_embed=dict(tree["patch_embed"]), output=dict(tree["output"]))
        tree["patch_embed"]["kernel"] = embed(tree["patch_embed"]["kernel"])
        for name in ("kernel", "bias"):
            tree["output"][name] = output(tree["output"][name])
        return tree

    params = ends(params)
    return params | ({"pooled": ends(params["pooled"])} if "pooled" in params else {})


def loss_of(config, params, image):
    process, model = make_process(config.diffusion, config.data.image_size), uvit.make_model(config)
    batch = {"image": jnp.asarray(image), "label": jnp.zeros(len(image), jnp.int32)}
    examples = step.draw_examples(config, process, batch, config.seed, jnp.int32(0))
    pooled = examples.get("pooled")

    def predict(x_BVP, time_B):
        ids = dict(visible_BV=examples.get("visible"), pooled_BG=pooled)
        return uvit.apply(model, params, x_BVP, time_B, label_B=examples["label"], **ids)

    given = examples["x0"], examples["eps"], examples["t"], config.diffusion.loss
    num_pooled = 0 if pooled is None else pooled.shape[1]
    return denoising_loss(predict, process, *given, num_pooled=num_pooled, pool_weight=0.2)


@pytest.mark.parametrize("framework", ["ddpm", "edm"])
@pytest.mark.parametrize("kind", ["none", "patch", "pooled"])
def test_rotated_weights_give_the_loss_of_the_model_on_pixels(tiny_config, kind, framework):
    config = tiny_config
    config.diffusion.framework = framework
    config.model.dtype = "float32"
    config.data.update(image_size=(16, 16), channels=3)
    config.mask.kind = "none" if kind == "none" else "patch"
    if kind == "pooled":
        pooled_config(config)
    image = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    params = textbook.perturbed(uvit.init_params(uvit.make_model(config), jax.random.key(0)))
    on_pixels = loss_of(config, params, image)
    config.model.wavelet = "haar"
    on_bands = loss_of(config, rotated(params, config.model.patch_size), image)
    assert_close(on_bands, on_pixels, 1e-5)
    unrotated = loss_of(config, params, image)
    assert np.abs(unrotated / on_pixels - 1).max() > 1e-3


def test_samples_of_rotated_weights_are_those_of_the_model_on_pixels(tiny_config):
    config, mesh = tiny_config, sharding.make_mesh(tiny_config, jax.devices()[:1])
    config.mask.kind = "none"
    params = state.fresh_params(config, mesh)
    index = np.arange(4, dtype=np.int32)
    images = {}
    for wavelet in ("none", "haar"):
        config.model.wavelet = wavelet
        weights = rotated(params, 2) if wavelet == "haar" else params
        images[wavelet] = draw.jit_draw(config, mesh, sharding.replicated(mesh))(weights, index)
    difference = np.abs(np.int32(images["none"]) - np.int32(images["haar"]))
    assert difference.max() <= 1 and difference.mean() < 0.01
    # They are clipped to pixels, not to coefficients: some reach both ends.
    assert images["haar"].min() == 0 and images["haar"].max() == 255


@pytest.mark.parametrize("kind", ["none", "patch", "pooled"])
def test_training_on_coefficients_is_alike_on_8_devices(tiny_config, kind):
    config = tiny_config
    config.model.update(wavelet="haar", depth=1)
    config.optim.update(warmup_steps=0, lr_peak=3e-3)
    config.mask.kind = "none" if kind == "none" else "patch"
    if kind == "pooled":
        pooled_config(config)
    losses, _ = curve(config, 1, steps=12)
    split, _ = curve(config, 8, steps=12)
    assert_close(split, losses, 1e-5)
    assert losses[-4:].mean() < losses[:2].mean()


def test_a_run_is_loaded_and_predicts_pixels(tiny_config, tmp_path):
    tiny_config.model.update(wavelet="haar", depth=1)
    tiny_config.train.num_steps = 1
    train.train(tiny_config, tmp_path)
    model = maskdm_jax.load(tmp_path)
    x0, eps = pixels(2, 2, 8, 8, 1)
    x_t = model.add_noise(x0, eps, 300)
    found_x0, found_eps = model.predict(x_t, 300, label=1)
    assert_close(model.add_noise(found_x0, found_eps, 300), x_t, 1e-5)
    tokens = patches.patchify(x_t, 2)
    visible = np.tile(np.arange(16), (2, 1))
    by_patch = model.predict(tokens, 300, label=1, visible_ids=visible)[0]
    assert_close(by_patch, patches.patchify(found_x0, 2), 1e-5)
    tiny_config.model.wavelet = "none"
    with pytest.raises(ConfigError, match=r"model.wavelet \(haar there, none here\)"):
        train.train(tiny_config, tmp_path)


# -------------------------------------------------------------------------------- configs and words
@pytest.mark.parametrize("size, tokens, visible", [("256", 1024, 308), ("512", 4096, 1232)])
def test_the_configs_of_the_large_model(size, tokens, visible):
    first, second = (
        config_file.load(f"configs/{stage}_dwt.py:{size}") for stage in ("pretrain", "finetune")
    )
    config_lib.check_same_architecture(first, second, "W")
    assert first.data.image_size == (int(size),) * 2
    assert (first.train.num_steps, second.train.num_steps) == (200_000, 550_000)
    assert flops.tokens_per_image(first) == visible + 1
    assert flops.tokens_per_image(second) == tokens + 1
    assert uvit.make_model(first).patch_dim == 4 * 4 * 12
    other = first.copy_and_resolve_references()
    other.model.wavelet = "none"
    assert flops.training_flops(other) == flops.training_flops(first)


def test_odd_sizes_are_refused(tiny_config):
    tiny_config.model.wavelet = "haar"
    for size, patch, said in (
        ((9, 9), 3, r"model.wavelet is 'haar'; .* \(9, 9\); type --config.model.wavelet=none$"),
        ((8, 9), 1, r"model.wavelet is 'haar'; .* \(8, 9\); type --config.model.wavelet=none$"),
        ((12, 12), 3, r"model.patch_size is 3; .*even.*; type --config.model.patch_size=4$"),
        ((14, 14), 7, r"model.patch_size is 7; .*even.*; type --config.model.patch_size=2$"),
        ((8, 8), 1, r"model.patch_size is 1; .*even.*; type --config.model.patch_size=2$"),
    ):
        tiny_config.data.image_size, tiny_config.model.patch_size = size, patch
        with pytest.raises(ConfigError, match=said):
            config_lib.validate(tiny_config)


def test_phases_keep_the_patch_of_a_model_with_a_wavelet(tiny_config):
    tiny_config.model.wavelet = "haar"
    tiny_config.phases = (1, {}), (1, {"model.patch_size": 4})
    with pytest.raises(ConfigError, match="patch_size is 4 after 2; expected the same with"):
        phases.validate(tiny_config)
