"""The Python interface against the programs, the training loss, and the official outputs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import textbook
from close import assert_close
from conftest import DATA, ROOT, TINY

import maskdm_jax
from configs import finetune_digits, pretrain_digits
from maskdm_jax import api, checkpoint, evaluate, images, sample, sharding, step, trained
from maskdm_jax.diffusion import ddpm, make_process
from maskdm_jax.diffusion.process import invert, network_input, noised, x0_and_eps
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import patches, uvit
from maskdm_jax.phases import phases
from maskdm_jax.run.telemetry import described_scores
from maskdm_jax.state import abstract_state, init_state
from maskdm_jax.weights import torch_file, torch_io


def config_of(module):
    config = module.get_config()
    config.update_from_flattened_dict(TINY)
    config.sample.update(sampler="ddim", batch_size=8, guidance_scale=1.0)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on one device with checkpoints 3 and 7, whose EMA is half its raw weights."""
    config = config_of(pretrain_digits)
    state = init_state(config, sharding.make_mesh(config, jax.devices()[:1]))
    folder = tmp_path_factory.mktemp("run")
    checkpoints = checkpoint.Checkpoints(folder, config)
    for number in (3, 7):
        params = textbook.perturbed(state.params, seed=number, scale=0.03)
        ema = jax.tree.map(lambda x: x / 2, params)
        state = state.replace(step=jnp.int32(number), params=params, ema=ema)
        checkpoints.save(number, state, force=True)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def model(workdir):
    return maskdm_jax.load(workdir)


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, maskdm_jax; heavy = {'jax', 'numpy', 'absl', 'ml_collections'}; "
        "assert not heavy & sys.modules.keys(); assert maskdm_jax.__all__ == ['Model', 'load']; "
        "assert maskdm_jax.load.__doc__ and not hasattr(maskdm_jax, 'train_step')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_checkpoint_is_found_by_each_of_its_paths(workdir, model):
    checkpoints = workdir / "checkpoints"
    for path, number in ((workdir, 7), (checkpoints, 7), (checkpoints / "3", 3), (str(workdir), 7)):
        assert maskdm_jax.load(path).step == number
    older = maskdm_jax.load(workdir, step=np.int32(3), weights="raw")
    assert type(older.step) is int  # for the record of its scores, which is JSON
    for name, kernel in (("3", older.params), ("7", model.params)):
        item = {"3": "params", "7": "ema"}[name]
        stored = checkpoint.restore_item(workdir, int(name), item)
        jax.tree.map(np.testing.assert_array_equal, kernel, stored)
    assert (model.image_shape, model.num_classes, model.num_patches) == ((8, 8, 1), 10, 16)
    assert model.num_timesteps == 1000 and "8x8x1, 10 classes" in repr(model)


def test_predictions_on_visible_patches_have_the_loss_that_training_reports(workdir):
    config = config_of(pretrain_digits)  # with patch masks
    config.model.class_dropout = 0.5
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    checkpoints = checkpoint.Checkpoints(workdir, config)
    state = checkpoints.restore(7, abstract_state(config, mesh))
    generator = np.random.default_rng(1)
    batch = {
        "image": generator.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8),
        "label": generator.integers(0, 10, (16,), dtype=np.int32),
    }
    process = make_process(config.diffusion, config.data.image_size)
    drawn = step.draw_examples(config, process, batch, config.seed, state.step)
    phase = phases(config)[0]
    plan = step.planned(phase, mesh)
    _, metrics = step.jit_train_step(phase, mesh)(state, {}, batch, plan)  # donates the state

    model = maskdm_jax.load(workdir, weights="raw")
    x_t = model.add_noise(drawn["x0"], drawn["eps"], drawn["t"])
    x0, eps = model.predict(x_t, drawn["t"], drawn["label"], drawn["visible"])
    assert x0.shape == (16, 8, 4) and (drawn["label"] == 10).any()
    loss = np.mean(np.square(np.asarray(eps) - drawn["eps"]))
    assert_close(loss, metrics["loss"], 1e-5)
    assert_close(model.add_noise(x0, eps, drawn["t"]), x_t, 1e-4)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predictions_on_whole_images_are_the_textbook_networks(prediction):
    config = config_of(finetune_digits)
    config.diffusion.prediction = prediction
    mesh = sharding.make_mesh(config)
    network = uvit.make_model(config, mesh)
    params = textbook.perturbed(uvit.init_params(network, jax.random.key(0)))
    plain = textbook.UViT(32, 3, 2, 4, 16, num_classes=10, mlp_time_embed=True)

    x0, eps = noise(3, 8, 8, 1) / 3, noise(3, 8, 8, 1)
    t, label = np.array([0, 400, 900]), np.array([1, 9, 10])
    level = make_process(config.diffusion, (8, 8)).at(t)
    x_t = patches.patchify(noised(level, x0, eps), 2)
    output = plain.apply({"params": params}, network_input(level, x_t), t, label_B=label)
    columns = jax.tree.map(lambda c: jnp.reshape(c, (-1, 1, 1)) * jnp.ones((3, 1, 1)), level)
    expected = x0_and_eps(invert(columns), x_t, output)

    model = api.Model(trained.Trained(config, params, None, ""))
    found = model.predict(model.add_noise(x0, eps, t), t, label)
    assert_close(found, tuple(patches.unpatchify(x, 2, (8, 8)) for x in expected), 2e-5)
    # One image alone, one timestep for all, and "no class" by default.
    alone = model.predict(model.add_noise(x0[2:], eps[2:], 900), 900)
    assert_close(alone, jax.tree.map(lambda x: x[2:], found), 2e-5)


def test_visible_patches_may_come_in_any_order(model):
    x_t, visible = noise(2, 8, 4), np.stack([np.arange(8), np.arange(8) + 5])
    order = np.random.default_rng(0).permutation(8)
    found = model.predict(x_t[:, order], 300, 2, visible[:, order])
    straight = model.predict(x_t, 300, 2, visible)
    assert_close(found, jax.tree.map(lambda x: x[:, order], straight), 1e-5)
    shifted = model.predict(x_t, 300, 2, visible + 1)
    assert np.abs(shifted[1] - straight[1]).max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": 5, "label": 3},
        {"sampler": "ddpm", "guidance_scale": 2.0},
        {"eta": 1.0, "steps": 3},
        {"sampler": "heun", "spacing": "karras", "threshold": 0.9},
        {"sampler": "dpm_solver", "guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)},
        {"recompute_eps": True},
    ],
)
def test_samples_are_those_of_the_sample_mode(workdir, model, settings):
    settings = {"steps": 4, "eta": 0.0, "sampler": "ddim"} | settings
    drawn = model.sample(11, **settings)
    config = config_of(pretrain_digits)
    config.sample.update(num=11, **settings)
    folder = sample.write_samples(config, workdir)
    expected = [images.read_png(sample.image_path(folder, i), 1) for i in range(11)]
    np.testing.assert_array_equal(drawn, np.stack(expected))
    few = model.sample(2, **settings)  # a smaller batch: the same up to rounding
    assert np.abs(few.astype(int) - drawn[:2]).max() <= 1


def test_another_seed_or_class_compiles_nothing_anew(workdir):
    model = maskdm_jax.load(workdir)
    first, other = (model.sample(3, steps=2, seed=seed) for seed in (0, 1))
    labelled = model.sample(3, steps=2, label=0)
    assert (first != other).any() and (first[0] == labelled[0]).all()
    (jitted,) = model._draws.values()
    assert jitted._cache_size() == 1


HALF = np.arange(64).reshape(8, 8) % 8 < 4


def test_inpainting_keeps_known_pixels_and_draws_the_others(model):
    given = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    drawn = model.inpaint(given, HALF, steps=4, sampler="dpm_solver")
    np.testing.assert_array_equal(drawn[:, HALF], given[:, HALF])
    other = np.where(HALF[..., None], given, 255 - given)  # of hidden pixels
    np.testing.assert_array_equal(model.inpaint(other, HALF, steps=4, sampler="dpm_solver"), drawn)
    alone = model.inpaint(given[1], HALF, 5, steps=4, sampler="dpm_solver", label=1)
    assert len(alone) == 5 and np.abs(alone[1].astype(int) - drawn[1]).max() <= 1
    assert (alone[1][~HALF] != alone[2][~HALF]).any()
    whole = model.inpaint(given, np.ones((8, 8), bool), steps=4)
    np.testing.assert_array_equal(whole, given)
    none = model.inpaint(given, np.zeros((8, 8), bool), steps=4, eta=1.0)
    assert np.abs(none.astype(int) - model.sample(3, steps=4, eta=1.0)).max() <= 1


def test_an_image_changes_more_the_greater_the_strength(model):
    given = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    changes = [
        np.abs(model.image_to_image(given, strength, steps=50) - given.astype(int)).mean()
        for strength in (0.02, 0.3, 1.0)
    ]
    assert changes[0] < 8 and changes[0] < changes[1] < changes[2]


def test_the_way_between_two_seeds_begins_and_ends_with_their_images(model):
    how = {"sampler": "heun", "steps": 3, "label": 4}
    way = model.interpolate(5, 8, 5, **how)
    assert way.shape == (5, 8, 8, 1)
    for image, seed in ((way[0], 5), (way[-1], 8)):
        assert np.abs(image.astype(int) - model.sample(1, seed=seed, **how)[0]).max() <= 1
    steps = [np.abs(np.diff(way[[i, j]].astype(int), axis=0)).mean() for i, j in ((0, 2), (0, 4))]
    assert 0 < steps[0] < steps[1]


def test_a_score_is_the_record_of_the_evaluate_mode(workdir, model, tmp_path):
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)):
        images.save_png(tmp_path / f"{i}.png", image)
    how = {"sampler": "heun", "steps": 3, "label": 4, "threshold": 0.99}
    found = model.score(10, tmp_path, metrics=("swd",), **how)
    config = config_of(pretrain_digits)
    config.sample.update(how, eta=0.0)
    config.eval.update(num=10, reference=str(tmp_path), metrics=("swd",), heldout_split="")
    (expected,) = evaluate.evaluate(config, workdir)
    for name in ("step", "scores", "definition", "warnings", "checkpoint_sha256", "evaluations"):
        assert found[name] == expected[name], name
    assert found["evaluations"] == 5 and found["definition"]["threshold"] == 0.99
    assert not {"recompute_eps", "guidance_interval"} & found["definition"].keys()  # at defaults
    assert "5 evaluations an image" in described_scores(found)
    assert found.keys() | {"images", "key"} == expected.keys()
    assert found["scores"]["swd"] > 0 and described_scores(found).startswith("step 7: swd")


COSINE = ddpm.make_betas("cosine", 1000, (32, 32)).astype(np.float32)


@pytest.fixture
def official_file(monkeypatch, tmp_path, official_model):
    """A .pt file in name only, read as the official model with these betas."""
    path = tmp_path / "official.pt"
    path.write_bytes(b"content")

    def read(betas=COSINE):
        found = torch_io.Official(official_model[1], betas, 4, 3)
        monkeypatch.setattr(torch_io, "load_official", lambda *args: found)
        return path

    return read


HEADS = {"model.num_heads": 4, "model.dtype": "float32"}


def test_an_official_file_gives_the_official_outputs(official_file, golden):
    model = maskdm_jax.load(official_file(), fields=HEADS)
    assert model.image_shape == (32, 32, 3) and model.config.diffusion.schedule == "cosine"
    x_t, eps = (np.moveaxis(golden[name], 1, -1) for name in ("x_t", "eps_full"))
    assert_close(model.predict(x_t, golden["t"])[1], eps, 1e-5)
    wide = maskdm_jax.load(official_file(), fields=HEADS | {"data.image_size": [16, 64]})
    assert (
        wide.image_shape == (16, 64, 3) and wide.predict(noise(1, 16, 64, 3), 3)[0].shape[1] == 16
    )
    few = ddpm.make_betas("linear", 500, (32, 32))
    assert maskdm_jax.load(official_file(few), fields=HEADS).num_timesteps == 500
    other = HEADS | {"diffusion.schedule": "linear", "diffusion.num_timesteps": 300}
    model = maskdm_jax.load(official_file(None), fields=other)
    assert model.num_timesteps == 300 and model.config.diffusion.schedule == "linear"


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, "does not hold its number of attention heads; type fields={'model.num_heads': HEADS}"),
        (HEADS | {"diffusion.schedule": "linear"}, "diffusion.schedule (cosine there, linear here"),
        (HEADS | {"data.image_size": (32, 64)}, "type fields={'data.image_size': (HEIGHT, WIDTH)}"),
        ({"model.num_heads": 7}, "model.num_heads is 7; expected a divisor of the width"),
        ({"model.num_heads": "7"}, "model.num_heads is '7'; expected a whole number"),
    ],
)
def test_what_an_official_file_contradicts_is_refused(official_file, fields, said):
    with pytest.raises(ConfigError) as error:
        maskdm_jax.load(official_file(), fields=fields)
    assert said in str(error.value) and "--config" not in str(error.value)


def test_a_schedule_without_a_name_is_refused(official_file):
    path = official_file(np.linspace(1e-4, 0.5, 1000))
    with pytest.raises(ConfigError, match="none of linear, cosine, shifted_cosine"):
        maskdm_jax.load(path, fields=HEADS)


def test_an_official_file_is_read_without_pytorch(tmp_path, golden):
    with np.load(DATA / "official_uncond_model.npz") as file:
        torch_file.save(tmp_path / "official.pt", {"model": dict(file)})
    model = maskdm_jax.load(tmp_path / "official.pt", weights="raw", fields=HEADS)
    x_t, eps = (np.moveaxis(golden[name], 1, -1) for name in ("x_t", "eps_full"))
    assert_close(model.predict(x_t, golden["t"])[1], eps, 1e-5)


IMAGES = noise(2, 8, 8, 1)
TOKENS = noise(2, 3, 4)
PIXELS = np.zeros((8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: m.sample(4, label=10), "label is 10; expected below .* 10; type label=-1"),
        (lambda m: m.sample(4, steps=1001), r"steps is 1001; expected 1 to .*; type steps=1000"),
        (lambda m: m.sample(4, steps=2.5), "steps is 2.5; expected a whole .*; type steps=2"),
        (lambda m: m.sample(0), "num is 0; expected a whole number, at least 1; type num=1"),
        (lambda m: m.sample(4, sampler="dim"), "type sampler='ddim'"),
        (lambda m: m.sample(4, eta=2), "eta is 2; .* between 0 and 1; type eta=1"),
        (lambda m: m.sample(4, seed=-1), "seed is -1; .*; type seed=0"),
        (lambda m: m.sample(4, spacing="logsnr"), "type spacing='log_snr'"),
        (lambda m: m.sample(4, threshold=99.5), "threshold is 99.5; .* type threshold=1"),
        (lambda m: m.sample(4, guidance_interval=(0.8, 0.2)), r"interval=\(0.2, 0.8\)"),
        (lambda m: m.inpaint(PIXELS, HALF[:4]), r"known_mask has shape \[4, 8\]; .*\[8, 8\]"),
        (lambda m: m.inpaint(PIXELS, np.uint8(HALF)), r"type known_mask.astype\(bool\)"),
        (lambda m: m.inpaint(PIXELS[:4], HALF), r"image has shape \[1, 4, 8, 1\]; .*\[M, 8, 8"),
        (lambda m: m.inpaint(IMAGES, HALF), r"float32 .*; expected uint8 .*; type np.rint\("),
        (lambda m: m.inpaint(PIXELS, HALF, steps=0), "type steps=1"),
        (lambda m: m.image_to_image(PIXELS, 2), "strength is 2; .*; type strength=1"),
        (lambda m: m.interpolate(3, 3), "seed_b is 3, as seed_a; .* type seed_b=4"),
        (lambda m: m.interpolate(3, -1), "seed is -1; expected"),
        (lambda m: m.interpolate(3, 4, 1), "num is 1; .* type num=2"),
        (lambda m: m.interpolate(3, 4, eta=1.0), "eta=1 adds noise .*; type sampler='ddim', eta=0"),
        (lambda m: m.interpolate(3, 4, sampler="ddpm"), "'ddpm' .* adds noise"),
        (lambda m: m.predict(IMAGES, 1000), "t holds 1000; expected 0 to 999"),
        (lambda m: m.predict(IMAGES, [3, -2]), "t holds -2; expected 0 to 999"),
        (lambda m: m.predict(IMAGES, [3, 4, 5]), r"t is int64 of shape \[3\]; expected .*\[2\]"),
        (lambda m: m.predict(IMAGES, 2.5), "t is float64 .*; expected an int"),
        (lambda m: m.predict(IMAGES, 3, 11), "label holds 11; expected 0 to 10"),
        (lambda m: m.predict(IMAGES[:, :4], 3), r"x_t has shape \[2, 4, 8, 1\]; .*\[B, 8, 8, 1\]"),
        (lambda m: m.predict(IMAGES[0], 3), r"x_t has shape \[8, 8, 1\]; expected \[B, 8, 8, 1\]"),
        (lambda m: m.predict(np.uint8(IMAGES), 3), "x_t has dtype uint8; .*; type x_t / 127.5 - 1"),
        (lambda m: m.predict(TOKENS, 3, None, [0, 1, 2]), r"visible_ids has shape \[3\]"),
        (lambda m: m.predict(TOKENS, 3, None, [[0, 1], [2, 3]]), r"expected \[2, 2, 4\]"),
        (lambda m: m.predict(TOKENS, 3, None, [[0, 1, 16]] * 2), "visible_ids holds 16; .* to 15"),
        (lambda m: m.predict(TOKENS, 3, None, [[-1, 1, 2]] * 2), "visible_ids holds -1; .*0 to 15"),
        (lambda m: m.predict(IMAGES, 3, None, [[0, 1, 2]] * 2), r"x_t has shape .*\[2, 3, 4\]"),
        (lambda m: m.add_noise(IMAGES, TOKENS, 3), "eps has shape"),
        (lambda m: m.score(4, "/nowhere"), "type reference='PATH'"),
        (lambda m: m.score(4, "/nowhere", 100), "features is 100; .* type features=64"),
        (lambda m: m.score(1, "/nowhere"), "num is 1; .*; type num=2"),
        (lambda m: m.score(4, "x", metrics=("memorisation",)), "type metrics="),
        (lambda m: m.score(4, "x", metrics=("fd",)), r"type metrics=\('fid',\)"),
        (lambda m: m.score(4, "x", steps=0), "type steps=1"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_sentence_in_the_words_of_python(model, call, said):
    with pytest.raises(ConfigError, match=said) as error:
        call(model)
    assert "--" not in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_classes_refuses_labels_and_guidance(official_file):
    model = maskdm_jax.load(official_file(), fields=HEADS)
    with pytest.raises(ConfigError, match="label is 3, but this model has no classes; leave it ou"):
        model.predict(noise(1, 32, 32, 3), 5, label=3)
    for wrong, said in (
        ({"guidance_scale": 2.0}, "type guidance_scale=1"),
        ({"label": 0}, "label"),
    ):
        with pytest.raises(ConfigError, match=said):
            model.sample(1, **wrong)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda w: maskdm_jax.load(w / "gone"), "does not exist; expected a run's"),
        (lambda w: maskdm_jax.load(w.parent), "holds no checkpoint; expected a run's"),
        (lambda w: maskdm_jax.load(w, step=5), r"holds steps \[3, 7\], not 5; type step=7"),
        (lambda w: maskdm_jax.load(ROOT / "README.md"), "not a PyTorch checkpoint; expected an"),
        (lambda w: maskdm_jax.load("s3://bucket/run"), "or gs://BUCKET/FOLDER in Google"),
        (lambda w: maskdm_jax.load(""), "path is ''; expected a path; type path='FOLDER'"),
        (lambda w: maskdm_jax.load(w, weights="emma"), "type weights='ema'"),
        (lambda w: maskdm_jax.load(w, fields={"model.width": 64}), r"\(32 there, 64 here\)"),
        (lambda w: maskdm_jax.load(w, fields={"dtype": "x"}), "no field of the config; .*; type '"),
        (lambda w: maskdm_jax.load(w, fields={"model.dtype": "f32"}),
         "type fields={'model.dtype': 'float32'}"),
        (lambda w: maskdm_jax.load(w, fields={"mesh.fsdp": 3}), "type fields={'mesh.fsdp': 1}"),
        (lambda w: maskdm_jax.load(w, fields={"sample.ema_std": 0.1}), "keeps one EMA"),
        (lambda w: maskdm_jax.load(w, fields=["model.dtype"]), "type fields={'model.dtype': 'floa"),
        (lambda w: maskdm_jax.load(w, fields={"sample.weights": "raw"}),
         r"argument of load; leave it out, and type load\(..., weights='raw'\)"),
        (lambda w: maskdm_jax.load(w, fields={"sample.eta": 1.0}), r"type sample\(..., eta=1.0"),
        (lambda w: maskdm_jax.load(w / "checkpoints/7", step=3), r"of step 7, .* step=3\)$"),
        (lambda w: maskdm_jax.load(w, step="3"), "step is '3'; expected an int, or None"),
        (lambda w: maskdm_jax.load(w, step=True), "step is True; expected an int, or None"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_one_sentence(workdir, call, said):
    with pytest.raises(ConfigError, match=said) as error:
        call(workdir)
    assert "--config" not in str(error.value) and "\n" not in str(error.value)
