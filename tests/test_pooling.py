"""Pooled hidden blocks: what is drawn, what the network makes of it, and both stages of a run."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import textbook
from close import assert_close
from conftest import TINY

from configs import finetune_digits, pretrain_digits
from maskdm_jax import (
    averages,
    checkpoint,
    draw,
    evaluate,
    flops,
    heldout,
    phases,
    sample,
    sharding,
    state,
    step,
    train,
)
from maskdm_jax.config import default_config, from_dict, validate, whole_images
from maskdm_jax.diffusion import make_process
from maskdm_jax.diffusion.objective import denoising_loss
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import attention, masking, patches, uvit
from maskdm_jax.weights import start


def pooling(kind="block", ratio=0.75, block_size=4, pool_size=2):
    return types.SimpleNamespace(
        kind=kind, ratio=ratio, block_size=block_size, pool_size=pool_size, hidden="pool"
    )


def pooled_config(config, **fields):
    """2 x 2 squares of patches of a 16 x 16 image, patch 2: 2 x 2 blocks, of which 1 is visible."""
    config.data.update(image_size=(16, 16), flip=False)
    config.mask.update(kind="block", ratio=0.75, block_size=4, hidden="pool", pool_size=2)
    config.model.depth = 1
    config.update_from_flattened_dict(fields)
    validate(config)
    return config


def images(count, size=16, seed=0):
    shape = (count, size, size, 1)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def drawn(config, image, number=0):
    process = make_process(config.diffusion, config.data.image_size)
    batch = {"image": jnp.asarray(image), "label": jnp.zeros(len(image), jnp.int32)}
    return process, step.draw_examples(config, process, batch, config.seed, jnp.int32(number))


# ------------------------------------------------------------------------------- masks and pixels
@pytest.mark.parametrize("q", [1, 2, 4])
def test_visible_patches_and_pooled_squares_cover_every_patch_once(q):
    mask, grid = pooling(pool_size=q), (8, 12)
    visible = np.asarray(masking.draw_visible_ids(jax.random.key(0), 5, mask, grid))
    pooled = np.asarray(masking.draw_pooled_ids(jax.random.key(0), 5, mask, grid))
    assert pooled.shape == (5, masking.num_pooled(mask, grid)) and (np.diff(pooled) > 0).all()
    square_of_patch = np.arange(96).reshape(grid) * 0
    for i in range(8):
        for j in range(12):
            square_of_patch[i, j] = (i // q) * (12 // q) + j // q
    for shown, squares in zip(visible, pooled, strict=True):
        hidden = np.flatnonzero(np.isin(square_of_patch, squares))
        assert sorted([*shown, *hidden]) == list(range(96))
    assert len({tuple(row) for row in pooled}) > 1


def test_the_same_patches_are_visible_whether_hidden_ones_are_dropped_or_pooled(tiny_config):
    config, image = pooled_config(tiny_config), images(4)
    _, pooled = drawn(config, image)
    config.mask.hidden = "drop"
    _, dropped = drawn(config, image)
    num_visible = dropped["x0"].shape[1]
    for name in ("x0", "eps"):
        np.testing.assert_array_equal(pooled[name][:, :num_visible], dropped[name])
    np.testing.assert_array_equal(pooled["visible"], dropped["visible"])
    assert "pooled" not in dropped


@pytest.mark.parametrize("block, q, size, expected", [
    (4, 4, 256, (416, 230)), (2, 2, 64, (28, 57)), (8, 4, 128, (128, 56)), (8, 8, 128, (128, 14)),
])  # fmt: skip
def test_counts_are_those_of_the_recipes(block, q, size, expected):
    config = default_config()
    config.data.image_size = (size, size)
    config.mask.update(kind="block", block_size=block, hidden="pool", pool_size=q)
    validate(config)
    grid = (size // 4, size // 4)
    counts = masking.num_visible(config.mask, grid), masking.num_pooled(config.mask, grid)
    assert counts == expected
    assert flops.tokens_per_image(config) == sum(expected) + 1


def test_a_pooled_token_is_the_mean_of_the_pixels_of_its_square():
    image = images(2, size=24)
    ids = np.array([[0, 4, 8], [1, 3, 5]])
    got = patches.pool(jnp.asarray(image), 2, 4, jnp.asarray(ids))  # squares of 8 x 8 pixels
    for b in range(2):
        for g, square in enumerate(ids[b]):
            i, j = divmod(square, 3)
            pixels = image[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8, 0] / 127.5 - 1
            quarters = [pixels[a : a + 4, c : c + 4].mean() for a in (0, 4) for c in (0, 4)]
            assert_close(got[b, g], quarters, 1e-6)


# -------------------------------------------------------------------------------------- the noise
def test_noisy_pooled_values_have_the_law_of_averages_of_noisy_pixels(tiny_config):
    config, count = pooled_config(tiny_config), 6000
    process, examples = drawn(config, np.repeat(images(1), count, 0))
    # All at one level, and for the images in which the last block is hidden, its first square.
    level = jax.tree.map(float, process.at(jnp.int32(400)))
    has = np.asarray((examples["pooled"] == 10).any(1))
    squares = np.asarray(examples["pooled"])[has]
    num_visible = examples["visible"].shape[1]
    both = {name: np.asarray(examples[name])[has] for name in ("x0", "eps")}
    y = level.signal * both["x0"] + level.noise * both["eps"]
    ours = y[:, num_visible:][squares == 10]

    # The same values from noisy pixels: patches 2 x 2 at (4, 4) of the grid, 4 x 4 pixels at 8.
    x0 = images(1)[0, 8:12, 8:12, 0] / 127.5 - 1
    eps = np.random.default_rng(1).normal(size=(len(ours), 4, 4))
    x_t = level.signal * x0 + level.noise * eps
    averages = x_t.reshape(-1, 2, 2, 2, 2).mean((2, 4)).reshape(-1, 4)
    std = level.noise / 2
    exact = level.signal * x0.reshape(2, 2, 2, 2).mean((1, 3)).reshape(-1)
    n = len(ours)
    assert n > count / 2
    for values in (ours, averages):  # five standard errors of each statistic
        assert np.abs(values.mean(0) - exact).max() < 5 * std / n**0.5
        covariance = np.cov(values.T)
        assert np.abs(covariance - std**2 * np.eye(4)).max() < 5 * std**2 * (2 / n) ** 0.5
    # Independent of the visible noise, and of the other squares of the block.
    others = np.concatenate([both["eps"][:, :4, 0], both["eps"][:, -3:, 0]], axis=1)
    mixed = np.corrcoef(np.concatenate([ours[:, :1], others], 1).T)[0, 1:]
    assert np.abs(mixed).max() < 5 / n**0.5
    # Nor are they the visible noise of other images.
    shown, hidden = np.split(np.asarray(examples["eps"]), [num_visible], axis=1)
    same_place = np.corrcoef(shown.ravel()[: hidden.size], hidden.ravel())[0, 1]
    assert abs(same_place) < 5 / hidden.size**0.5


def test_a_perturbed_input_has_averages_of_the_perturbation_too(tiny_config):
    config = pooled_config(tiny_config)
    config.diffusion.input_perturbation = 0.5
    _, examples = drawn(config, np.repeat(images(1), 2000, 0))
    num_pooled = examples["pooled"].shape[1]
    xi = np.asarray((examples["input_eps"] - examples["eps"]) / 0.5)
    for values, std in ((xi[:, :-num_pooled], 1), (xi[:, -num_pooled:], 1 / 2)):
        assert abs(values.std() / std - 1) < 5 / (2 * values.size) ** 0.5


# --------------------------------------------------------------------------- network and gradients
SMALL = dict(num_patches=48, patch_dim=4, width=16, depth=3, num_heads=2, grid=(6, 8), pool_size=2)


def test_output_and_gradients_are_those_of_a_textbook_uvit(monkeypatch):
    monkeypatch.setattr(attention, "_padding", lambda kernel, num_tokens: 5)
    options = dict(num_classes=3, mlp_time_embed=True, qkv_bias=True)
    model, plain = uvit.UViT(**SMALL, **options, remat="blocks"), textbook.UViT(**SMALL, **options)
    params = textbook.perturbed(uvit.init_params(model, jax.random.key(0)))
    x = jax.random.normal(jax.random.key(5), (2, 4 + 3, 4))
    t, label = jnp.asarray([3, 700]), jnp.asarray([1, 3])
    visible = jnp.asarray([[0, 1, 8, 9], [30, 31, 38, 39]])
    pooled = jnp.asarray([[1, 5, 11], [0, 2, 4]])

    def ours(params):
        ids = dict(visible_BV=visible, pooled_BG=pooled, label_B=label)
        return uvit.apply(model, params, x, t, **ids)

    def expected(params):
        return plain.apply({"params": params}, x, t, visible, label, pooled)

    def results(apply):
        def loss(params):
            output = apply(params)
            return jnp.square(output).mean(), output

        (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return output, gradients

    (output, gradients), (true_output, true_gradients) = results(ours), results(expected)
    assert_close(output, true_output, 1e-5)
    assert_close(gradients, true_gradients, 2e-5)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients["pooled"]))


def test_whole_images_run_without_pooled_parameters_and_give_the_same():
    model = uvit.UViT(**SMALL)
    params = uvit.init_params(model, jax.random.key(0))
    alone = uvit.UViT(**{**SMALL, "pool_size": 0})
    rest = {name: value for name, value in params.items() if name != "pooled"}
    assert jax.tree.structure(rest) == jax.tree.structure(
        jax.eval_shape(lambda: uvit.init_params(alone, jax.random.key(0)))
    )
    x, t = jax.random.normal(jax.random.key(1), (2, 48, 4)), jnp.asarray([3, 700])
    np.testing.assert_array_equal(uvit.apply(model, params, x, t), uvit.apply(alone, rest, x, t))


def test_a_hidden_block_matters_by_its_averages_alone(tiny_config):
    config = pooled_config(tiny_config)
    model = uvit.make_model(config)
    params = textbook.perturbed(uvit.init_params(model, jax.random.key(0)))
    image = images(2)
    process, examples = drawn(config, image)
    num_pooled = examples["pooled"].shape[1]

    def loss(image_BHWC):
        x0 = jnp.concatenate([
            patches.cut(image_BHWC, 2, examples["visible"]),
            patches.pool(image_BHWC, 2, 2, examples["pooled"]),
        ], axis=1)  # fmt: skip

        def predict(x_BVP, time_B):
            return uvit.apply(
                model, params, x_BVP, time_B, visible_BV=examples["visible"],
                pooled_BG=examples["pooled"], label_B=jnp.zeros(2, jnp.int32),
            )  # fmt: skip

        given = x0, examples["eps"], examples["t"]
        return denoising_loss(
            predict, process, *given, num_pooled=num_pooled, pool_weight=0.2
        ).mean()

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(image, jnp.float32)))[..., 0]
    blocks = gradient.reshape(2, 2, 8, 2, 8).swapaxes(2, 3).reshape(2, 4, 8, 8)
    hidden = [[b for b in range(4) if b != v] for v in visible_blocks(examples["visible"])]
    for b in range(2):
        for block in blocks[b, hidden[b]]:
            squares = block.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(-1, 4)
            # The same in all pixels that are averaged: a pattern with mean zero changes nothing.
            assert (squares == squares[:, :1]).all() and (squares != 0).all()

    # On the pixels themselves: such a pattern leaves every bit of what is drawn.
    change = np.tile([[1, -1], [-1, 1]], (2, 8, 8))
    for b, block in enumerate(visible_blocks(examples["visible"])):
        i, j = divmod(block, 2)
        change[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = 0
    image = np.clip(image, 1, 254)
    changed = (image + change[..., None]).astype(np.uint8)
    assert (changed != image).sum() == 2 * 192
    (_, before), (_, after) = drawn(config, image), drawn(config, changed)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def visible_blocks(visible_BV):
    first = np.asarray(visible_BV)[:, 0]
    return (first // 8 // 4) * 2 + (first % 8) // 4


# ---------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_loss_is_that_of_the_visible_patches_plus_the_weighted_one_of_pooled_tokens(
    prediction, norm
):
    settings = types.SimpleNamespace(
        framework="ddpm", schedule="cosine", num_timesteps=1000, prediction=prediction
    )
    process, t = make_process(settings, (32, 32)), jnp.asarray([10, 900])
    generator = np.random.default_rng(0)
    x0, eps, noise = generator.normal(size=(3, 2, 7, 4)).astype(np.float32)
    eps[:, 5:] /= 4

    def predict(x_BVP, time_B):
        return jnp.sin(3 * x_BVP) + noise

    signal, sigma = (np.asarray(x)[:, None, None] for x in process.at(t)[:2])
    output = np.sin(3 * (signal * x0 + sigma * eps)) + noise
    targets = {"eps": eps, "x0": x0, "v": signal * eps - sigma * x0}
    error = output - targets[prediction]
    error = error**2 if norm == "l2" else np.abs(error)
    expected = error[:, :5].mean((1, 2)) + 0.3 * (2 / 5) * error[:, 5:].mean((1, 2))
    loss_B = denoising_loss(predict, process, x0, eps, t, norm, num_pooled=2, pool_weight=0.3)
    assert_close(loss_B, expected, 1e-5)


def curve(config, num_devices, steps=3):
    mesh = sharding.make_mesh(config, jax.devices()[:num_devices])
    phase, run = phases.phases(config)[0], state.init_state(config, mesh)
    update, plan = step.jit_train_step(phase, mesh), step.planned(phase, mesh)
    losses = []
    for number in range(steps):
        batch = {"image": images(16, seed=number), "label": np.arange(16, dtype=np.int32) % 10}
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        run, metrics = update(run, {}, batch, plan)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(losses), run


def test_eight_devices_with_split_parameters_give_the_losses_of_one(tiny_config):
    config = pooled_config(tiny_config, **{"optim.warmup_steps": 0, "diffusion.prediction": "v"})
    alone, _ = curve(config, 1)
    config.mesh.fsdp = 4
    config.optim.accumulate_steps = 2
    together, run = curve(config, 8)
    assert_close(together, alone, 1e-5)
    kernel = run.params["pooled"]["patch_embed"]["kernel"]
    assert not kernel.sharding.is_fully_replicated


def test_with_nothing_hidden_there_is_no_pooled_term(tiny_config):
    config = pooled_config(tiny_config, **{"mask.ratio": 0.0})
    losses, _ = curve(config, 1, steps=1)
    assert np.isfinite(losses).all()
    assert flops.tokens_per_image(config) == 66
    examples = drawn(config, images(2))[1]
    config.mask.hidden = "drop"
    assert examples.keys() == drawn(config, images(2))[1].keys()
    assert examples["x0"].shape == (2, 64, 4)


# ---------------------------------------------------------------------------------- configs, stages
@pytest.mark.parametrize("fields, expected, remedy", [
    ({"kind": "none"}, "mask.kind is 'none'", "--config.mask.hidden=drop"),
    ({"kind": "patch"}, "mask.kind is 'patch'", "--config.mask.hidden=drop"),
    ({"pool_size": 3}, "a divisor of mask.block_size, 4", "--config.mask.pool_size=2"),
    ({"pool_size": 9}, "mask.pool_size is 9", "--config.mask.pool_size=4"),
    ({"pool_weight": -1.0}, "mask.pool_weight is -1.0", "--config.mask.pool_weight=0"),
])  # fmt: skip
def test_what_cannot_be_pooled_is_refused(fields, expected, remedy):
    config = default_config()
    config.mask.update(kind="block", hidden="pool")
    validate(config)
    config.mask.update(fields)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert expected in str(error.value) and str(error.value).endswith(remedy)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, data_dir):
    """(workdir, config) of two updates on the digits, half of whose blocks are pooled; its EMA is
    not its raw weights."""
    config = pretrain_digits.get_config()
    small(config, data_dir)
    config.mask.update(kind="block", block_size=2, hidden="pool", pool_size=2)
    config.optim.update(ema_ramp=False, ema_decay=0.5)
    workdir = tmp_path_factory.mktemp("pooled") / "w1"
    train.train(config, workdir)
    return workdir, config


@pytest.fixture(scope="module")
def stage2(stage1, data_dir, tmp_path_factory):
    """(workdir, config) of two updates on whole digits, from stage 1's raw weights."""
    config = pretrained(stage1, data_dir)
    workdir = tmp_path_factory.mktemp("whole") / "w2"
    train.train(config, workdir)
    return workdir, config


def small(config, data_dir):
    config.update_from_flattened_dict(TINY)
    config.model.depth = 1
    config.data.dir = str(data_dir)
    config.optim.warmup_steps = 0
    config.train.update(num_steps=2, log_every_steps=1, sample_every_steps=0)
    config.sample.update(num=8, batch_size=8, sampler="ddim", steps=2)
    config.eval.update(num=8, metrics=("swd",))
    validate(config)


def pretrained(stage1, data_dir):
    """The config of a stage 2 that starts from stage 1."""
    config = finetune_digits.get_config()
    small(config, data_dir)
    config.init.path = str(stage1[0])
    return config


def load(config):
    """`start.load_params` of a run from another's workdir."""
    mesh = sharding.make_mesh(config)
    return start.load_params(config, lambda: state.fresh_params(config, mesh))


@pytest.mark.parametrize("weights, item", [("raw", "params"), ("ema", "ema")])
def test_stage_2_starts_from_all_weights_but_the_pooled_ones(stage1, data_dir, weights, item):
    config = pretrained(stage1, data_dir)
    config.init.weights = weights
    params, table = load(config)
    stored = checkpoint.restore_item(stage1[0], 2, item)
    assert len(jax.tree.leaves(stored.pop("pooled"))) == 7
    jax.tree.map(np.testing.assert_array_equal, params, stored)
    left_out = [row.name for row in table.rows if row.outcome == "left out"]
    assert len(left_out) == 7 and all(name.startswith("pooled/") for name in left_out)


def test_a_misfit_of_stage_2_is_named_without_the_pooled_weights(stage1, data_dir):
    config = pretrained(stage1, data_dir)
    config.model.width = 64
    with pytest.raises(ConfigError) as error:
        load(config)
    assert "model.width" in str(error.value) and "mask.hidden" not in str(error.value)


def test_a_pooled_stage_needs_pooled_weights_unless_they_are_named(stage1, stage2):
    config = from_dict(stage1[1].to_dict())
    config.init.path = str(stage2[0])
    with pytest.raises(ConfigError) as error:
        load(config)
    text = str(error.value)
    assert "mask.hidden (drop there, pool here); type --config.mask.hidden=drop" in text
    assert "--config.init.reinit=\"('pooled/.*',)\"" in text
    for field in ("ignore", "reinit"):
        config.init.update(ignore=(), reinit=())
        config.init[field] = ("pooled/.*",)
        params, table = load(config)
        assert table.count("fresh") == 7 and f"init.{field}" in table.text()
    assert (params["pooled"]["norm"]["scale"] == 1).all()


def test_a_pooled_run_resumes_only_as_what_it_is(stage1, data_dir):
    config = from_dict(stage1[1].to_dict())
    config.train.num_steps = 3
    config.mask.hidden = "drop"
    with pytest.raises(ConfigError, match="mask.hidden .pool there, drop here.*hidden=pool"):
        train.train(config, stage1[0])
    config = pretrained(stage1, data_dir)
    config.train.num_steps = 3
    with pytest.raises(ConfigError, match="another --workdir and --config.init.path="):
        train.train(config, stage1[0])


def test_both_stages_draw_images_and_are_scored(stage1, stage2):
    first, config = stage1
    second, tuned = stage2
    assert "pooled" not in checkpoint.restore_item(second, 2, "params")
    assert len(list(sample.write_samples(tuned, second).glob("0*.png"))) == 8
    # A pooled checkpoint draws with the config of either stage.
    assert sample.write_samples(tuned, first).is_relative_to(first)
    (record,) = evaluate.evaluate(config, first)
    assert np.isfinite(record["scores"]["swd"])


def test_the_held_out_loss_of_a_pooled_run_is_that_of_its_other_weights(stage1):
    workdir, config = stage1
    image, index = images(8, size=8), np.arange(8, dtype=np.int32)
    losses = []
    for each in (config, whole_images(config)):
        mesh = sharding.make_mesh(each)
        params = averages.restore(each, workdir, 2, draw.abstract_params(each, mesh))
        assert ("pooled" in params) == (each is config)
        losses.append(heldout.jit_heldout_loss(each, mesh)(params, image, index, index))
    assert losses[0].shape == (8, heldout.NUM_BINS)
    np.testing.assert_array_equal(*losses)
