import errno
import json
import os
import shutil
import types
import zlib

import jax
import numpy as np
import pytest
import textbook
from close import assert_close
from PIL import Image

from maskdm_jax import checkpoint, draw, images, sample, sharding, state
from maskdm_jax.config import default_config
from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.model import uvit

# (means, standard deviations) of images 3 and 8.
PINNED_DRAWS = {
    "timestep": [[133.703, 134.547], [103.370, 98.041]],
    "log_snr": [[135.781, 133.734], [99.871, 102.802]],
}


@pytest.fixture
def trained(trained, tmp_path):
    """A copy of that workdir, to draw into."""
    return shutil.copytree(trained, tmp_path / "trained")


def drawn(folder, channels=1):
    return {p.name: images.read_png(p, channels) for p in sorted(folder.glob("0*.png"))}


def test_image_i_depends_on_seed_and_i_alone(tiny_config, trained, tmp_path):
    tiny_config.sample.num = 10
    folder = sample.write_samples(tiny_config, trained)
    first = drawn(folder)
    assert len(first) == 10 and (folder / "grid.png").exists()
    assert json.loads((folder / "settings.json").read_text())["step"] == 2

    # An interrupted run: existing images stay, missing ones are drawn, with another batch size.
    kept = (folder / "000001.png").stat().st_mtime_ns
    for index in (0, 5, 9):
        (folder / f"{index:06d}.png").unlink()
    tiny_config.sample.batch_size = 16
    assert sample.write_samples(tiny_config, trained) == folder
    again = drawn(folder)
    assert (folder / "000001.png").stat().st_mtime_ns == kept
    for name, image in first.items():
        assert np.abs(image.astype(int) - again[name].astype(int)).max() <= 1, name

    tiny_config.sample.seed = 1
    other = drawn(sample.write_samples(tiny_config, trained))
    assert (other["000000.png"] != first["000000.png"]).any()


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"sample.sampler": "ddpm"}, "step2_ema_ddpm4_seed0_"),
        (
            {"sample.eta": 0.0, "sample.weights": "raw", "sample.guidance_scale": 2.0,
             "sample.label": 3},
            "step2_raw_ddim4_eta0_guidance2_label3_seed0_",
        ),
    ],
)  # fmt: skip
def test_other_settings_have_other_folders(tiny_config, trained, fields, name):
    tiny_config.sample.num = 3
    tiny_config.update_from_flattened_dict(fields)
    folder = sample.write_samples(tiny_config, trained)
    assert folder.name.startswith(name) and len(drawn(folder)) == 3


def test_the_folder_depends_on_every_setting_that_an_image_may_depend_on(tiny_config, trained):
    name = sample.folder_of(tiny_config, trained, 2)
    for field, value in (
        ("sample.spacing", "log_snr"), ("sample.guidance_scale", 1.5), ("model.dtype", "bfloat16"),
        ("model.attention", "xla"), ("diffusion.num_timesteps", 500), ("sample.seed", 1),
    ):  # fmt: skip
        other = tiny_config.copy_and_resolve_references()
        other.update_from_flattened_dict({field: value})
        assert sample.folder_of(other, trained, 2) != name, field
    tiny_config.sample.update(num=7, batch_size=24, preview_num=3)
    assert sample.folder_of(tiny_config, trained, 2) == name


def test_replaced_checkpoints_get_a_folder_of_their_own(tiny_config, tmp_path):
    tiny_config.sample.update(num=2, steps=1)
    for seed in (0, 1):
        tiny_config.seed = seed
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        checkpoints = checkpoint.Checkpoints(tmp_path, tiny_config)
        fresh = state.init_state(tiny_config, sharding.make_mesh(tiny_config))
        checkpoints.save(2, fresh, force=True)
        checkpoints.close()
        sample.write_samples(tiny_config, tmp_path)
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_a_workdir_without_the_model_is_named(tiny_config, trained, tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        sample.write_samples(tiny_config, tmp_path)
    tiny_config.model.width = 64
    with pytest.raises(ConfigError, match="--config.model.width=32"):
        sample.write_samples(tiny_config, trained)


def test_a_checkpoint_with_numbers_that_are_not_finite_is_not_drawn_from(tiny_config, tmp_path):
    fresh = state.init_state(tiny_config, sharding.make_mesh(tiny_config))
    params = jax.tree.map(np.array, fresh.params)
    params["patch_embed"]["kernel"][0, 0] = np.nan
    checkpoints = checkpoint.Checkpoints(tmp_path, tiny_config)
    checkpoints.save(4, fresh.replace(ema=params), force=True)
    checkpoints.close()
    with pytest.raises(ConfigError) as error:
        sample.write_samples(tiny_config, tmp_path)
    assert f"checkpoint 4 of {tmp_path} (ema)" in str(error.value)
    assert "patch_embed/kernel first" in str(error.value)
    assert str(error.value).endswith("--config.sample.weights=raw")
    tiny_config.sample.update(weights="raw", num=1, steps=1)
    sample.write_samples(tiny_config, tmp_path)


def test_a_draw_gives_these_images(tiny_config):
    # Measured with this test, on a CPU: noise per step, classes, guidance and spacing all count.
    tiny_config.sample.update(sampler="ddpm", steps=3, guidance_scale=2.0)
    mesh = sharding.make_mesh(tiny_config, jax.devices()[:1])
    params = textbook.perturbed(state.fresh_params(tiny_config, mesh), scale=0.03)
    for spacing, pinned in PINNED_DRAWS.items():
        tiny_config.sample.spacing = spacing
        jitted = draw.jit_draw(tiny_config, mesh, sharding.replicated(mesh))
        images_BHWC = np.asarray(jitted(params, np.array([3, 8], np.int32)), np.float64)
        moments = [images_BHWC.mean((1, 2, 3)), images_BHWC.std((1, 2, 3))]
        assert_close(np.array(moments), np.array(pinned), 0.002)


@pytest.mark.parametrize(
    "fields",
    [dict(sampler="heun"), dict(sampler="dpm_solver", spacing="karras", threshold=0.9)],
    ids=["heun", "dpm_solver"],
)
@pytest.mark.parametrize("known", [False, True], ids=["from-noise", "inpainting"])
def test_image_i_is_the_same_on_any_number_of_devices(tiny_config, fields, known):
    tiny_config.sample.update(fields, steps=3, guidance_scale=2.0, guidance_interval=(0.2, 0.8))
    given = {}
    if known:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
        given = {"images": pixels, "known": np.eye(8, dtype=bool)}
    drawn_on = {}
    for count, index_B in ((1, [5, 3]), (8, [0, 1, 2, 3, 4, 5, 6, 7])):
        mesh = sharding.make_mesh(tiny_config, jax.devices()[:count])
        params = textbook.perturbed(state.fresh_params(tiny_config, mesh), scale=0.03)
        jitted = draw.jit_draw(tiny_config, mesh, sharding.batch_sharding(mesh))
        images_BHWC = jitted(params, np.array(index_B, np.int32), **given)
        drawn_on[count] = dict(zip(index_B, np.asarray(images_BHWC, int), strict=True))
    for index in (3, 5):
        assert np.abs(drawn_on[1][index] - drawn_on[8][index]).max() <= 1
        if known:
            found, expected = (x[np.eye(8, dtype=bool)] for x in (drawn_on[1][index], pixels[1]))
            np.testing.assert_array_equal(found, expected)


def test_unknown_pixels_enter_a_walk_only_below_full_strength(tiny_config, monkeypatch):
    monkeypatch.setattr(draw.samplers, "walk", lambda *args, image, **settings: image)
    pixels = np.random.default_rng(0).integers(0, 120, (3, 8, 8, 1), np.uint8)
    known = np.eye(8, dtype=bool)
    mesh = sharding.make_mesh(tiny_config, jax.devices()[:1])
    for strength, expected in ((1.0, np.where(known[..., None], pixels, 128)), (0.5, pixels)):
        tiny_config.sample.strength = strength
        jitted = draw.jit_draw(tiny_config, mesh, sharding.replicated(mesh))
        seen = jitted({}, np.array([4, 3], np.int32), images=pixels, known=known)
        np.testing.assert_array_equal(seen, expected[[1, 0]])


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(), 50),
        (dict(sampler="heun"), 99),
        (dict(sampler="heun", guidance_scale=3.0), 198),
        (dict(guidance_scale=3.0, guidance_interval=(0.0, 0.0), spacing="log_snr"), 51),
        (dict(guidance_scale=3.0, guidance_interval=(0.25, 0.75), spacing="log_snr"), 74),
        (dict(guidance_scale=3.0, guidance_interval=(0.515, 0.52), spacing="log_snr"), 50),
        (dict(strength=0.3), 15),
        (dict(strength=0.0, sampler="heun"), 1),
    ],
)
def test_what_an_image_costs_counts_each_evaluation(tiny_config, fields, expected):
    tiny_config.sample.update(fields, steps=50)
    assert draw.evaluations(tiny_config, from_image="strength" in fields) == expected


def test_a_picture_is_continued_where_the_mask_is_black(tiny_config, trained, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    mask = np.zeros((8, 8, 1), np.uint8)
    mask[:, :4] = 255
    for name, picture in (("face", pixels), ("mask", mask)):
        images.save_png(tmp_path / f"{name}.png", picture)
    given = dict(init_image=str(tmp_path / "face.png"), init_mask=str(tmp_path / "mask.png"))
    tiny_config.sample.update(given, num=3)
    inpainted = sample.write_samples(tiny_config, trained)
    assert "_inpainted_" in inpainted.name
    first = drawn(inpainted)
    for image in first.values():
        np.testing.assert_array_equal(image[:, :4], pixels[:, :4])
    assert (first["000000.png"][:, 4:] != first["000001.png"][:, 4:]).any()

    # What is hidden has no influence, but another picture is another folder.
    pixels[:, 4:] = 255 - pixels[:, 4:]
    images.save_png(tmp_path / "face.png", pixels)
    again = sample.write_samples(tiny_config, trained)
    assert again != inpainted
    for name, image in drawn(again).items():
        np.testing.assert_array_equal(image, first[name])

    tiny_config.sample.update(init_mask="", strength=0.25)
    near = sample.write_samples(tiny_config, trained)
    assert "_strength0.25_" in near.name
    assert json.loads((near / "settings.json").read_text())["evaluations"] == 1


def test_image_i_has_class_i_unless_a_class_is_chosen(tiny_config):
    mesh = sharding.make_mesh(tiny_config, jax.devices()[:1])
    params = textbook.perturbed(state.fresh_params(tiny_config, mesh), scale=0.3)

    def drawn_with(label):
        tiny_config.sample.update(label=label, steps=2)
        jitted = draw.jit_draw(tiny_config, mesh, sharding.replicated(mesh))
        return np.asarray(jitted(params, np.array([3, 18], np.int32)))

    each, threes, eights = (drawn_with(label) for label in (-1, 3, 8))
    np.testing.assert_array_equal(each[0], threes[0])
    np.testing.assert_array_equal(each[1], eights[1])
    assert (threes[0] != eights[0]).any() and (threes[1] != eights[1]).any()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver", "heun"])
def test_guidance_of_0_draws_without_a_class_in_one_call_of_the_network(
    tiny_config, sampler, monkeypatch
):
    mesh = sharding.make_mesh(tiny_config, jax.devices()[:1])
    params = textbook.perturbed(state.fresh_params(tiny_config, mesh), scale=0.3)
    tiny_config.sample.update(sampler=sampler, steps=2, guidance_scale=0.0)
    apply, batches = uvit.apply, []

    def seen(model, params, x_BNP, time_B, label_B):
        batches.append((len(x_BNP), len(label_B)))
        return apply(model, params, x_BNP, time_B, label_B=label_B)

    monkeypatch.setattr(uvit, "apply", seen)
    jitted = draw.jit_draw(tiny_config, mesh, sharding.replicated(mesh))
    index_B = np.arange(3, dtype=np.int32)
    drawn = [np.asarray(jitted(params, index_B, label=np.int32(label))) for label in (3, 10, 8)]
    assert set(batches) == {(6, 6)} and drawn[0].std() > 10
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_a_full_disk_is_one_sentence_and_keeps_what_is_whole(
    tiny_config, trained, tmp_path, monkeypatch
):
    tiny_config.sample.num = 12
    saved, save_png = [], images.save_png

    def full(path, image):
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(path)
        save_png(path, image)

    monkeypatch.setattr(images, "save_png", full)
    with pytest.raises(RunError, match="No space left .* about 0.0 MiB are needed.* draws the res"):
        sample.write_samples(tiny_config, trained)
    assert len(saved) == 3 and all(path.exists() for path in saved)
    (folder,) = (trained / "samples").iterdir()
    left = folder / ".000007.png.host-1"  # of a process that was killed
    left.write_bytes(b"half")
    monkeypatch.setattr(images, "save_png", save_png)
    sample.write_samples(tiny_config, trained)
    assert len(drawn(folder)) == 12 and not left.exists()


def test_an_image_that_is_not_whole_is_drawn_again(tiny_config, trained, tmp_path):
    tiny_config.sample.num = 4
    folder = sample.write_samples(tiny_config, trained)
    first = drawn(folder)
    (folder / "000001.png").write_bytes(b"")
    (folder / "000002.png").write_bytes((folder / "000002.png").read_bytes()[:-20])
    images.save_png(folder / "000003.png", np.zeros((5, 5, 1), np.uint8))
    sample.write_samples(tiny_config, trained)
    for name, image in drawn(folder).items():
        assert np.abs(image.astype(int) - first[name].astype(int)).max() <= 1, name


def test_a_checkpoint_that_is_retired_while_sampling_waits_is_one_sentence(
    tiny_config, trained, tmp_path, monkeypatch
):
    tiny_config.sample.num = 4
    restore = checkpoint.restore_item

    def retired(*args):
        shutil.rmtree(trained / "checkpoints" / "2")
        return restore(*args)

    monkeypatch.setattr(checkpoint, "restore_item", retired)
    with pytest.raises(RunError, match="checkpoint 2 .* was retired meanwhile"):
        sample.write_samples(tiny_config, trained)


@pytest.mark.parametrize(
    "platform, devices, fields, num, size",
    [
        ("gpu", 1, {}, None, 504),  # 257 tokens: 8 images make a multiple of 8
        ("gpu", 1, {}, 50, 56),
        ("gpu", 1, {}, 9, 9),  # 16 would cost more than it saves
        ("gpu", 4, {"sample.batch_size": 100}, None, 100),  # 128 likewise
        ("gpu", 4, {"sample.batch_size": 252}, None, 256),
        ("gpu", 1, {"model.num_classes": 10, "sample.batch_size": 502}, None, 504),  # 258: 4 do
        ("gpu", 1, {"model.num_classes": 10, "sample.batch_size": 500}, None, 500),
        ("gpu", 1, {"model.dtype": "float32"}, None, 500),
        ("cpu", 1, {}, None, 500),
        ("cpu", 4, {}, 6, 8),
    ],
)
def test_on_gpus_a_batch_has_whole_eights_of_tokens(platform, devices, fields, num, size):
    config = default_config()
    config.update_from_flattened_dict(
        {"data.image_size": (64, 64), "model.patch_size": 4, "sample.batch_size": 500} | fields
    )
    each = np.array([types.SimpleNamespace(platform=platform)] * devices)
    mesh = types.SimpleNamespace(devices=each, size=devices, shape={"data": devices, "fsdp": 1})
    assert draw.batch_size(config, mesh, num) == size


def test_a_picture_to_start_from_is_read_as_training_reads_it(tmp_path):
    config, path = default_config(), tmp_path / "p.png"
    config.data.update(channels=1, image_size=(8, 8))
    config.sample.init_image = str(path)
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(path)
    read = sample.start_image(config)["images"][0, ..., 0]
    assert np.abs(read - deep / 257.0).max() <= 1  # not white
    config.data.channels = 3
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(path)  # transparent, so on white
    assert (sample.start_image(config)["images"] == 255).all()
    data = bytearray(path.read_bytes())
    data[16:24] = (16_000).to_bytes(4, "big") * 2  # a size that Pillow refuses to decode
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="is no picture that can be read; expected one of 8x8"):
        sample.start_image(config)
