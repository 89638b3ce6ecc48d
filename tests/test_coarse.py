"""Coarse tokens at strong noise: which levels, what the network makes of them, and a whole run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import textbook
from close import assert_close
from conftest import TINY
from test_pooling import curve, images

from configs import phases_digits
from maskdm_jax import (
    checkpoint,
    denoiser,
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
from maskdm_jax.api import load
from maskdm_jax.config import whole_images
from maskdm_jax.diffusion import make_process
from maskdm_jax.diffusion.process import invert, network_input, noised, target, x0_and_eps
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import patches, uvit
from maskdm_jax.run import memory

COARSE = ((2, 1.0), (4, 2.5))
FRAMEWORKS = [
    {"diffusion.framework": "ddpm", "diffusion.prediction": name} for name in ("eps", "x0", "v")
] + [{"diffusion.framework": "edm"}]


def coarse_config(config, **fields):
    """Images of 16 x 16, patch 2: 64 patches, or 16 or 4 coarse tokens."""
    config.data.update(image_size=(16, 16), flip=False)
    config.mask.kind = "none"
    config.model.update(depth=1, coarse=COARSE)
    config.update_from_flattened_dict(fields)
    phases.validate(config)
    return config


def drawn(config, image):
    process = make_process(config.diffusion, config.data.image_size)
    label = jnp.arange(len(image), dtype=jnp.int32) % 10
    batch = {"image": jnp.asarray(image), "label": label}
    return process, step.draw_examples(config, process, batch, config.seed, jnp.int32(0))


def ratios(process, t_B):
    level = process.at(t_B)
    return np.asarray(level.noise / level.signal)


# -------------------------------------------------------------------------------------- the levels
DRAWS = [
    {},
    {"diffusion.draw": "logit_normal", "diffusion.draw_std": 1.5},
    {"diffusion.framework": "edm", "diffusion.edm_std": 2.0},
]


@pytest.mark.parametrize("fields", DRAWS)
def test_each_size_is_trained_at_its_own_levels_with_its_share_of_the_draws(tiny_config, fields):
    config = coarse_config(tiny_config, **fields)
    process, count = make_process(config.diffusion, (16, 16)), 20_000
    every = ratios(process, process.draw(jax.random.key(0), count))
    tiers = denoiser.tiers(config)
    assert [(t.size, t.low, t.high) for t in tiers] == [
        (1, 0, 1), (2, 1, 2.5), (4, 2.5, math.inf)
    ]  # fmt: skip
    assert sum(process.share(t.low, t.high) for t in tiers) == pytest.approx(1)
    for tier in tiers:
        found = ratios(process, process.draw(jax.random.key(1), count, tier.low, tier.high))
        assert found.min() > tier.low * (1 - 1e-6) and found.max() <= tier.high * (1 + 1e-6)
        of_all = every[(tier.low < every) & (every <= tier.high)]
        share = process.share(tier.low, tier.high)
        # Five standard errors of the share, and of the quartiles of its levels.
        assert abs(len(of_all) / count - share) < 5 * (share * (1 - share) / count) ** 0.5
        for quantile in (0.25, 0.5, 0.75):
            below = np.mean(of_all <= np.quantile(found, quantile))
            assert abs(below - quantile) < 0.01 + 5 * (0.25 / len(of_all) + 0.25 / count) ** 0.5


def test_bounded_draws_are_finite_however_many(tiny_config):
    config = coarse_config(
        tiny_config, **{"diffusion.framework": "edm", "model.coarse": ((2, 10),)}
    )
    process = make_process(config.diffusion, (16, 16))
    for low, high in ((10, math.inf), (0, 10)):
        sigma = np.asarray(process.draw(jax.random.key(0), 2**22, low, high))
        assert np.isfinite(sigma).all() and sigma.min() > low


@pytest.mark.parametrize("fields", FRAMEWORKS)
def test_the_level_of_a_time_is_that_of_its_draw(tiny_config, fields):
    config = coarse_config(tiny_config, **fields)
    process = make_process(config.diffusion, (16, 16))
    t_B = process.draw(jax.random.key(0), 100)
    level = process.at(t_B)
    there = process.at_time(jnp.asarray(level.time, jnp.float32))
    for name in ("signal", "noise", "p", "q", "scale"):
        value, expected = (jnp.broadcast_to(getattr(x, name), (100,)) for x in (there, level))
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-7)
    ladder = process.ladder(50, "log_snr")
    if config.diffusion.framework == "ddpm":  # whose times lie between timesteps
        there = process.at_time(jnp.asarray(ladder.time, jnp.float32))
        np.testing.assert_allclose(there.noise / there.signal, ladder.noise / ladder.signal, 1e-3)


# ------------------------------------------------------------------------------------- the examples
def test_coarse_examples_are_averages_of_the_same_images_with_the_noise_of_averages(tiny_config):
    config = coarse_config(tiny_config, **{"diffusion.input_perturbation": 0.5})
    image = np.repeat(images(1), 500, 0)
    process, examples = drawn(config, image)
    for size, count in ((2, 16), (4, 4)):
        coarse = examples[f"coarse_{size}"]
        side = 16 // size
        means = image[0].reshape(side, size, side, size).mean((1, 3))[None, ..., None] / 127.5 - 1
        assert_close(coarse["x0"], np.repeat(patches.patchify(means, 2), 500, 0), 1e-6)
        assert coarse["eps"].shape == (500, count, 4)
        xi = (coarse["input_eps"] - coarse["eps"]) / 0.5
        for noise in map(np.asarray, (coarse["eps"], xi)):
            assert abs(noise.std() * size - 1) < 5 / (2 * noise.size) ** 0.5
        cut = np.asarray(examples["eps"])[:, :count].ravel(), np.asarray(coarse["eps"]).ravel()
        assert abs(np.corrcoef(*cut)[0, 1]) < 5 / cut[0].size ** 0.5
    assert not np.array_equal(examples["coarse_2"]["t"], examples["coarse_4"]["t"])


def test_every_so_many_images_are_seen_as_coarse_tokens_with_their_label_at_their_levels(
    tiny_config,
):
    config = coarse_config(tiny_config, **{"diffusion.coarse_every": 4, "model.class_dropout": 0.0})
    image = images(16)
    process, examples = drawn(config, image)
    for tier in denoiser.tiers(config):
        given = examples if tier.size == 1 else examples[f"coarse_{tier.size}"]
        found = ratios(process, given["t"])
        assert tier.low < found.min() and found.max() <= tier.high
        if tier.size > 1:
            assert_close(given["x0"], patches.pool(image[::4], 2, tier.size), 1e-6)
            assert given["label"].tolist() == [0, 4, 8, 2]


def test_patches_and_their_averages_are_each_other_s_inverse():
    x_BGP = jax.random.normal(jax.random.key(0), (2, 6, 4 * 3))
    fine = patches.repeat(x_BGP, 2, (12, 8), 2)
    assert fine.shape == (2, 24, 12)
    assert_close(patches.average(fine, 2, (12, 8), 2), x_BGP, 1e-6)
    image = images(2)
    pooled, x = patches.pool(image, 2, 4), patches.cut(image, 2)
    assert_close(patches.average(x, 2, (16, 16), 4), pooled, 1e-6)


# --------------------------------------------------------------------------------------- the output
@pytest.mark.parametrize("fields", FRAMEWORKS)
@pytest.mark.parametrize("alike", [False, True])
def test_a_network_that_knows_the_averages_predicts_them_and_nothing_between(
    tiny_config, monkeypatch, fields, alike
):
    config = coarse_config(tiny_config, **fields)
    process = make_process(config.diffusion, (16, 16))
    x0 = patches.cut(jnp.asarray(images(3)), 2)
    eps = jax.random.normal(jax.random.key(0), x0.shape)
    for tier in denoiser.tiers(config):
        t = process.draw(jax.random.key(1), 3, tier.low, min(tier.high, 20.0))
        t = t[:1].repeat(3) if alike else t
        level = process.at(t)

        def knowing(model, params, x_BVP, time_B, label_B=None, coarse=0, level=level, tier=tier):
            if (coarse or 1) != tier.size:
                return jnp.full_like(x_BVP, jnp.nan)
            averaged = (patches.average(x, 2, (16, 16), tier.size) for x in (x0, eps))
            return target(level, *averaged)

        monkeypatch.setattr(uvit, "apply", knowing)
        predict = denoiser.make_predict(config, None, process, alike)
        x_t = noised(level, x0, eps)
        output = predict(None, network_input(level, x_t), jnp.asarray(level.time))
        inverse = jax.tree.map(lambda x: jnp.broadcast_to(x, (3,))[:, None, None], invert(level))
        found, _ = x0_and_eps(inverse, x_t, output)
        averages = patches.average(x0, 2, (16, 16), tier.size)
        assert_close(found, patches.repeat(averages, 2, (16, 16), tier.size), 1e-4)


SMALL = dict(num_patches=48, patch_dim=4, width=16, depth=3, num_heads=2, grid=(6, 8))


def test_output_and_gradients_are_those_of_a_textbook_uvit_on_pooled_tokens_alone():
    options = dict(num_classes=3, mlp_time_embed=True, qkv_bias=True)
    model = uvit.UViT(**SMALL, **options, coarse=(2,))
    plain = textbook.UViT(**SMALL, **options, pool_size=2)
    params = textbook.perturbed(uvit.init_params(model, jax.random.key(0)))
    x = jax.random.normal(jax.random.key(5), (2, 12, 4))
    t, label = jnp.asarray([3, 700]), jnp.asarray([1, 3])

    def ours(params):
        return uvit.apply(model, params, x, t, label_B=label, coarse=2)

    def expected(params):
        params = {**params, "pooled": params["coarse_2"]}
        every = jnp.arange(12)[None].repeat(2, 0)
        given = x, t, jnp.zeros((2, 0), jnp.int32), label, every
        return plain.apply({"params": params}, *given)

    def results(apply):
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(apply(p)).mean()))(params)

    (value, gradients), (true_value, true_gradients) = results(ours), results(expected)
    assert_close(value, true_value, 1e-5)
    assert_close(gradients, true_gradients, 2e-5)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients["coarse_2"]))
    assert not np.any(gradients["patch_embed"]["kernel"])


def test_all_other_parameters_start_as_without_coarse_tokens():
    alone = uvit.init_params(uvit.UViT(**SMALL), jax.random.key(0))
    params = uvit.init_params(uvit.UViT(**SMALL, coarse=(2,)), jax.random.key(0))
    assert params.keys() - alone.keys() == {"coarse_2"}
    jax.tree.map(np.testing.assert_array_equal, alone, {k: params[k] for k in alone})


# ----------------------------------------------------------------------------- the loss, devices
MASKED = {
    "mask.kind": "block", "mask.block_size": 4, "mask.ratio": 0.75, "diffusion.coarse_every": 2,
    "optim.accumulate_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("fields, devices", [({}, 8), (MASKED, 4), (MASKED | DRAWS[1], 4)])
def test_devices_with_split_parameters_give_the_losses_of_one(tiny_config, fields, devices):
    config = coarse_config(tiny_config, **{"optim.warmup_steps": 0} | fields)
    alone, _ = curve(config, 1)
    config.mesh.fsdp = devices // 2
    phases.validate_devices(config, devices, "train")
    together, run = curve(config, devices)
    assert_close(together, alone, 1e-5)
    assert not run.params["coarse_2"]["patch_embed"]["kernel"].sharding.is_fully_replicated


@pytest.mark.parametrize("every, draw", [(4, DRAWS[0]), *((1, draw) for draw in DRAWS)])
def test_the_loss_is_the_mean_over_all_levels_of_those_at_each_size(tiny_config, every, draw):
    config = coarse_config(
        tiny_config, **{"diffusion.prediction": "v", "diffusion.coarse_every": every}, **draw
    )
    params = state.fresh_params(config, sharding.make_mesh(config, jax.devices()[:1]))
    model = uvit.make_model(config)
    process, examples = drawn(config, images(16))
    expected = 0.0
    for tier in denoiser.tiers(config):
        given, coarse, n = examples, 0, 1
        if tier.size > 1:
            given, coarse, n = examples[f"coarse_{tier.size}"], tier.size, every
        assert len(given["x0"]) == 16 // n
        level = process.at(given["t"])
        x_t = network_input(level, noised(level, given["x0"], given["eps"]))
        label = examples["label"][::n]
        output = uvit.apply(model, params, x_t, level.time, label_B=label, coarse=coarse)
        errors = output - target(level, given["x0"], given["eps"])
        expected += process.share(tier.low, tier.high) * np.square(errors).mean()
    losses, _ = curve(config, 1, steps=1)
    assert_close(losses[0, 0], expected, 1e-5)


# -------------------------------------------------------------------------------------- a whole run
@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """(workdir, config) of a masked phase and one on whole digits, patch 1: 64, 16 or 4 tokens."""
    config = phases_digits.get_config()
    config.update_from_flattened_dict(TINY)
    config.data.dir = str(data_dir)
    config.model.update(patch_size=1, coarse=COARSE)
    masked = {"mask.kind": "block", "mask.block_size": 2, "mask.ratio": 0.75}
    masked["diffusion.coarse_every"] = 2
    config.phases = ((1, masked), (1, {}))
    config.train.update(num_steps=4, sample_every_steps=0)
    config.sample.update(steps=6, batch_size=8, num=8)
    workdir = tmp_path_factory.mktemp("coarse")
    train.train(config, workdir)
    return workdir, config


def test_a_run_in_phases_keeps_them_and_draws_and_scores(run):
    workdir, config = run
    params = checkpoint.restore_item(workdir, 4, "params")
    assert {"coarse_2", "coarse_4"} <= params.keys()
    stored = checkpoint.load_config(workdir, 4)
    assert stored.model.coarse == COARSE  # pairs are tuples again
    assert len(list(sample.write_samples(config, workdir).glob("0*.png"))) == 8
    config.eval.update(metrics=("swd",), num=8)
    (record,) = evaluate.evaluate(config, workdir)
    assert all(map(math.isfinite, record["scores"].values()))


def test_drawing_takes_each_level_s_own_tokens(run):
    workdir, config = run
    config = whole_images(phases.at(config, 4).config)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    params = jax.tree.map(jnp.asarray, checkpoint.restore_item(workdir, 4, "params"))
    drawing = jax.jit(draw.make_draw(config, mesh))
    made = drawing(params, jnp.arange(4))
    for name in ("coarse_2", "coarse_4", "patch_embed"):
        other = params | {name: jax.tree.map(lambda x: x + 0.1, params[name])}
        assert not np.array_equal(drawing(other, jnp.arange(4)), made)


def test_predictions_are_of_the_level_s_own_tokens_and_patches_alone_are_refused_there(run):
    model = load(run[0], weights="raw")
    image = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    x0, _ = model.predict(image, np.array([0, 600, 990]))
    squares = np.asarray(x0).reshape(3, 4, 2, 4, 2)
    spread = np.ptp(squares, axis=(2, 4)).max((1, 2)) / np.abs(squares).max((1, 2, 3, 4))
    assert spread[1:].max() < 1e-5 and spread[0] > 0.01
    ids = np.arange(8)[None].repeat(3, 0)
    visible = image.reshape(3, 64, 1)[:, :8]
    model.predict(visible, 100, visible_ids=ids)
    with pytest.raises(ConfigError, match="t has 990 .* reads coarse tokens; .* leave out"):
        model.predict(visible, np.array([0, 600, 990]), visible_ids=ids)


def test_a_run_starts_from_weights_without_coarse_tokens_if_it_is_told_to(run, trained, tmp_path):
    config = run[1].copy_and_resolve_references()
    config.init.path = str(trained)
    config.model.patch_size, config.phases = 2, ()
    config.train.num_steps = 1
    with pytest.raises(ConfigError, match=r"init.reinit=.*coarse_2/\.\*"):
        train.train(config, tmp_path / "run")
    config.init.reinit = ("coarse_.*",)
    with pytest.raises(ConfigError, match="model.coarse"):
        train.train(config, tmp_path / "run")
    config.init.allow = ("model.coarse",)
    train.train(config, tmp_path / "run")
    assert "coarse_4" in checkpoint.restore_item(tmp_path / "run", 1, "params")


def test_the_held_out_loss_reads_each_level_s_own_tokens(run):
    workdir, config = run
    config = whole_images(phases.at(config, 4).config)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    params = jax.tree.map(jnp.asarray, checkpoint.restore_item(workdir, 4, "params"))
    loss = heldout.jit_heldout_loss(config, mesh)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 8, 8, 1), dtype=np.uint8)
    given = image, np.zeros(8, np.int32), np.arange(8, dtype=np.int32)
    before = np.asarray(loss(params, *given)).mean(0)

    def changed(name):
        other = params | {name: jax.tree.map(lambda x: x + 0.1, params[name])}
        return np.asarray(loss(other, *given)).mean(0) != before

    # Bins of ln(signal^2 / noise^2) by 2 from -10: r 1 is 0, and r 2.5 is -1.8.
    in_4 = changed("coarse_4").tolist()
    assert in_4[:4] == [True] * 4 and not any(in_4[5:])
    assert changed("coarse_2").tolist() == [False] * 4 + [True] + [False] * 5
    assert changed("patch_embed").tolist() == [False] * 5 + [True] * 5


# -------------------------------------------------------------------------------- costs, refusals
def test_an_image_costs_its_patches_and_its_coarse_tokens(tiny_config):
    config = coarse_config(tiny_config)
    extra = 2 if config.model.num_classes else 1
    assert flops.coarse_tokens(config) == {2: 16 + extra, 4: 4 + extra}
    assert flops.tokens_text(config) == f"{64 + extra} + {16 + extra} + {4 + extra}"
    fine, *coarse = [flops.forward_flops(config, n + extra) for n in (64, 16, 4)]
    assert flops.training_flops(config) == 3 * (fine + sum(coarse))
    config.diffusion.coarse_every = 4
    assert flops.training_flops(config) == 3 * (fine + sum(coarse) / 4)
    assert flops.tokens_text(config) == f"{64 + extra} + {16 + extra} / 4 + {4 + extra} / 4"
    config.sample.update(sampler="ddim", steps=50, guidance_scale=1.0)
    by_size = draw.evaluations_by_size(config)
    assert sum(by_size.values()) == draw.evaluations(config) == 50 and all(by_size.values())
    each = [flops.forward_flops(config, n + extra) for n in (64, 16, 4)]
    assert draw.model_flops(config) == sum(
        n * x for n, x in zip(by_size.values(), each, strict=True)
    )


@pytest.mark.parametrize("coarse, near", [
    (((3, 1.0),), "()"), (((2, 1.0), (2, 2.0)), "((2, 1.0),)"), (((2, 1e9),), "()"),
    (((4, 1.0), (2, 2.0)), "((4, 1.0),)"), (((2, 1.0), (4, 1.0)), "((2, 1.0),)"),
])  # fmt: skip
def test_sizes_and_levels_that_cannot_work_are_refused(tiny_config, coarse, near):
    with pytest.raises(ConfigError) as error:
        coarse_config(tiny_config, **{"model.coarse": coarse})
    assert f'type --config.model.coarse="{near}"' in str(error.value)
    assert "8 x 8" in str(error.value)


def test_an_image_in_so_many_must_divide_the_batch(tiny_config):
    with pytest.raises(ConfigError, match="coarse_every is 3; .* type .*coarse_every=2"):
        coarse_config(tiny_config, **{"diffusion.coarse_every": 3})
    config = coarse_config(tiny_config, **{"diffusion.coarse_every": 4})
    with pytest.raises(ConfigError, match="a multiple of 32, .* x diffusion.coarse_every"):
        phases.validate_devices(config, 8, "train")
    config.train.batch_size = 64
    assert "--config.train.batch_size=32" in memory.advice(config, num_devices=8)
    config.train.batch_size = 32
    assert "batch_size" not in memory.advice(config, num_devices=8)
