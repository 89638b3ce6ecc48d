import ast
import os
import pickle
import re
import zipfile

import jax
import numpy as np
import pytest
from conftest import DATA

from maskdm_jax import checkpoint, sharding
from maskdm_jax.config import default_config
from maskdm_jax.diffusion import ddpm
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import uvit
from maskdm_jax.state import init_state
from maskdm_jax.weights import start, torch_file


def tiny_config():
    config = default_config()
    config.data.update(image_size=(4, 4), channels=1)
    config.model.update(width=8, depth=3, num_heads=2, patch_size=2)
    return config


def init(path, weights="raw", ignore=(), **fields):
    config = tiny_config()
    config.init.update(path=str(path), weights=weights, ignore=ignore)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def load(config, fresh):
    return start.load_params(config, lambda: fresh)


def small(width=8, depth=3, **fields):
    sizes = dict(num_patches=4, patch_dim=4, width=width, depth=depth, num_heads=2)
    model = uvit.UViT(**sizes, **fields)
    return uvit.init_params(model, jax.random.key(9))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with one checkpoint whose EMA is twice its raw weights."""
    config = tiny_config()
    state = init_state(config, sharding.make_mesh(config, jax.devices()[:1]))
    state = state.replace(ema=jax.tree.map(lambda x: 2 * x, state.params))
    folder = tmp_path_factory.mktemp("run")
    checkpoints = checkpoint.Checkpoints(folder, config)
    checkpoints.save(7, state, force=True)
    checkpoints.close()
    return folder, state


@pytest.mark.parametrize("weights, scale", [("raw", 1), ("ema", 2)])
def test_raw_or_ema_weights_are_loaded(workdir, weights, scale):
    folder, state = workdir
    params, table = load(init(folder, weights), small())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, scale * b), params, state.params)
    assert table.source.endswith(f"({weights}, step 7)")
    assert table.count("restored") == len(table.rows) == 42


def test_weights_that_do_not_fit_are_named_whole_blocks_as_one_expression(workdir):
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0]), small(depth=5))
    text = str(error.value)
    # Every block of the sides, also those whose names fit; no expression lets the rest pass.
    assert "48 of 66 weights" in text and "missing in_block_1/" in text
    assert "init.map='in_block=0,0 out_block=0,0' to choose each block's source" in text
    assert "init.reinit" not in text and "init.ignore" not in text
    fresh = small()
    fresh["mid_block"]["norm_more"] = fresh["mid_block"].pop("norm_mlp")
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0]), fresh)
    text = str(error.value)
    assert "missing mid_block/norm_more/" in text and "unexpected mid_block/norm_mlp/" in text
    assert "',)\" to start these afresh and leave these out, or" in text
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0]), small(width=16))
    assert "in_block_0/mlp_in/kernel has shape [8, 32], expected [16, 64]" in str(error.value)


def test_another_optimizer_takes_the_weights_and_is_no_reason_for_a_misfit(workdir):
    params, _ = load(init(workdir[0], optim__name="muon"), small())
    jax.tree.map(np.testing.assert_array_equal, params, workdir[1].params)
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0], optim__name="muon"), small(depth=5))
    assert "missing in_block_1/" in str(error.value) and "optim" not in str(error.value)


def test_ignored_weights_stay_fresh(workdir):
    fresh = small()
    ignore = (".*_block_0/.*", "position")
    params, table = load(init(workdir[0], "raw", ignore), fresh)
    np.testing.assert_array_equal(params["position"], fresh["position"])
    np.testing.assert_array_equal(
        params["mid_block"]["qkv"]["kernel"], workdir[1].params["mid_block"]["qkv"]["kernel"]
    )
    assert {row.why for row in table.rows if row.outcome == "fresh"} == {"init.ignore"}
    assert table.count("fresh") == 25, table.text(every=True)


@pytest.mark.parametrize(
    "field, value, there",
    [
        ("diffusion.prediction", "v", "eps"),
        ("diffusion.schedule", "linear", "cosine"),
        ("diffusion.num_timesteps", 500, "1000"),
        ("model.num_heads", 4, "2"),
    ],
)
def test_weights_of_another_meaning_are_refused_unless_the_field_is_allowed(
    workdir, field, value, there
):
    changed = {field.replace(".", "__"): value}
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0], **changed), small())
    text = str(error.value)
    assert f"{field} ({there} there, {value} here)" in text
    assert f"--config.{field}={there}" in text.replace('"', "")
    hint = re.search(r'--config.init.allow="(.*?)"', text)[1]
    params, _ = load(init(workdir[0], init__allow=ast.literal_eval(hint), **changed), small())
    kernel = params["mid_block"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, workdir[1].params["mid_block"]["qkv"]["kernel"])


def test_the_config_names_the_schedule_where_two_are_the_same():
    config = tiny_config()
    config.diffusion.schedule = "shifted_cosine"
    betas = ddpm.make_betas("shifted_cosine", 1000, (64, 64))
    assert ddpm.schedule_of(betas, config.diffusion, (64, 64)) == "shifted_cosine"
    assert ddpm.schedule_of(betas, tiny_config().diffusion, (64, 64)) == "cosine"


def test_a_size_and_its_own_number_of_heads_mean_the_same(workdir):
    load(init(workdir[0], model__size="S", model__num_heads=2), small())


def test_a_path_without_weights_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load(init(tmp_path / "nowhere"), small())
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        load(init(tmp_path), small())


def test_an_official_pt_file_is_read(tmp_path, official_model):
    with np.load(DATA / "official_uncond_model.npz") as file:
        weights = dict(file)
    betas = ddpm.make_betas("cosine", 1000, (32, 32)).astype(np.float32)
    path = tmp_path / "official.pt"
    torch_file.save(path, {"step": 1, "model": weights | {"betas": betas}, "ema": {}})
    model, expected = official_model
    fresh = uvit.init_params(model, jax.random.key(0))
    network = {
        "data__image_size": (32, 32), "data__channels": 3, "model__width": 64, "model__depth": 4,
        "model__num_heads": 4, "model__patch_size": 4,
    }  # fmt: skip
    params, _ = load(init(path, **network), fresh)
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    # The file's betas give its schedule and number of timesteps; it predicts eps.
    for field, value, there in (
        ("diffusion.schedule", "linear", "cosine"),
        ("diffusion.num_timesteps", 500, "1000"),
        ("diffusion.prediction", "v", "eps"),
    ):
        changed = network | {field.replace(".", "__"): value}
        with pytest.raises(ConfigError, match=re.escape(f"{field} ({there} there, {value} here)")):
            load(init(path, **changed), fresh)
        load(init(path, init__allow=(field,), **changed), fresh)
    torch_file.save(path, {"model": weights | {"betas": betas * np.float32(0.9)}})
    with pytest.raises(ConfigError, match="unknown there, cosine here") as error:
        load(init(path, **network), fresh)
    assert "=unknown" not in str(error.value)

    torch_file.save(path, {"weights": weights})
    with pytest.raises(ConfigError, match="has no 'model' entry; expected .* official .pt file"):
        load(init(path), fresh)


def test_the_hint_works_when_typed(workdir):
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0]), small(qkv_bias=True))
    hint = re.search(r'--config.init.reinit="(.*?)"', str(error.value))[1]
    config = init(workdir[0], init__reinit=ast.literal_eval(hint))
    _, table = load(config, small(qkv_bias=True))
    assert {row.why for row in table.rows if row.outcome == "fresh"} == {"init.reinit"}
    assert table.count("fresh") == 6


def test_another_width_is_answered_with_the_flag_that_fits_the_weights(workdir):
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0], model__width=16), small(width=16))
    text = str(error.value)
    assert "model.width (8 there, 16 here); type --config.model.width=8" in text
    assert len(text) < 400 and "init.reinit" not in text  # it would leave out almost all


def test_weights_that_are_not_finite_are_refused_unless_they_are_left_out(workdir, tmp_path):
    config, state = tiny_config(), workdir[1]
    params = jax.tree.map(np.array, state.params)
    params["patch_embed"]["kernel"][0, 0] = np.inf
    checkpoints = checkpoint.Checkpoints(tmp_path, config)
    checkpoints.save(3, state.replace(params=params), force=True)
    checkpoints.close()
    with pytest.raises(ConfigError, match="1 of 42 .* not finite, patch_embed/kernel first"):
        load(init(tmp_path), small())
    load(init(tmp_path, "ema"), small())
    load(init(tmp_path, ignore=("patch_embed/kernel",)), small())


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.pt", b"", "is empty"),
        ("a.pt", b"text", "is not a PyTorch checkpoint"),
        ("a.pt", pickle.dumps({"model": {}}), "is not a PyTorch checkpoint"),
        ("a.pt", b"PK\x03\x04 and no more", "was cut short"),
        ("a.safetensors", b"\2\0\0\0\0\0\0\0{}", "is a safetensors file, not a PyTorch checkpoint"),
    ],
)
def test_a_file_of_another_format_is_refused_without_pytorch(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{expected}; .* type --config.init.path=PATH"):
        load(init(tmp_path / name), small())


def test_the_folder_of_checkpoints_is_answered_with_the_workdir(workdir):
    for path in (workdir[0] / "checkpoints", workdir[0] / "checkpoints" / "7"):
        with pytest.raises(ConfigError, match=f"type --config.init.path={workdir[0]}$"):
            load(init(path), small())


def test_a_pt_file_with_code_or_of_another_model_is_refused_in_our_own_words(tmp_path):
    with zipfile.ZipFile(tmp_path / "code.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": os.getcwd}, 2))
    with pytest.raises(ConfigError, match="an object of posix.getcwd, .* any code; expected"):
        load(init(tmp_path / "code.pt"), small())
    other = {f"model.encoder.layer{i}.weight": np.zeros((2, 2)) for i in range(30)}
    for weights, expected in (({"model.x": np.zeros(1)}, "no weights"), (other, "are missing")):
        torch_file.save(tmp_path / "other.pt", {"model": weights})
        with pytest.raises(
            ConfigError, match=f"{expected}.* type --config.init.path=PATH"
        ) as error:
            load(init(tmp_path / "other.pt"), small())
        assert len(str(error.value)) < 600
    whole = (tmp_path / "other.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="was cut short"):
        load(init(tmp_path / "cut.pt"), small())
