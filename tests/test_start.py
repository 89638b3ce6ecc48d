import ast
import re

import jax
import numpy as np
import pytest
from conftest import DATA, NEEDS_TORCH

from maskdm_jax import checkpoint, sharding
from maskdm_jax.config import default_config
from maskdm_jax.diffusion import ddpm
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import uvit
from maskdm_jax.state import init_state
from maskdm_jax.weights import start


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
    def schedule_of(betas):
        return ddpm.schedule_of(betas, config.diffusion, (32, 32))

    return start.load_params(config, lambda: fresh, schedule_of)


def small(width=8, depth=3):
    model = uvit.UViT(num_patches=4, patch_dim=4, width=width, depth=depth, num_heads=2)
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
    params, note = load(init(folder, weights), small())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, scale * b), params, state.params)
    assert f"{weights}, step 7" in note


def test_every_weight_that_does_not_fit_is_listed(workdir):
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0]), small(depth=5))
    text = str(error.value)
    assert "missing in_block_1/qkv/kernel" in text and "missing out_block_1/skip/bias" in text
    fresh = small()
    del fresh["mid_block"]["norm_mlp"]
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0]), fresh)
    assert "unexpected mid_block/norm_mlp/scale" in str(error.value)
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0]), small(width=16))
    assert "position has shape [5, 8], expected [5, 16]" in str(error.value)


def test_ignored_weights_stay_fresh(workdir):
    fresh = small(depth=5)
    ignore = (".*_block_1/.*", "position")
    params, note = load(init(workdir[0], "raw", ignore), fresh)
    np.testing.assert_array_equal(params["position"], fresh["position"])
    np.testing.assert_array_equal(
        params["mid_block"]["qkv"]["kernel"], workdir[1].params["mid_block"]["qkv"]["kernel"]
    )
    assert "fresh because of init.ignore" in note and "position" in note


@pytest.mark.parametrize(
    "field, value, there",
    [
        ("diffusion.prediction", "v", "eps"),
        ("diffusion.schedule", "linear", "cosine"),
        ("diffusion.num_timesteps", 500, "1000"),
        ("model.num_heads", 4, "2"),
        ("data.image_size", (2, 8), "(4, 4)"),
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


def test_another_grid_is_accepted_if_the_position_table_starts_fresh(workdir):
    load(init(workdir[0], ignore=("position",), data__image_size=(2, 8)), small())


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
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    with np.load(DATA / "official_uncond_model.npz") as file:
        weights = {name: torch.from_numpy(array) for name, array in file.items()}
    betas = torch.from_numpy(ddpm.make_betas("cosine", 1000, (32, 32)).astype(np.float32))
    path = tmp_path / "official.pt"
    torch.save({"step": 1, "model": weights | {"betas": betas}, "ema": {}}, path)
    model, expected = official_model
    fresh = uvit.init_params(model, jax.random.key(0))
    params, note = load(init(path), fresh)
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    # The file's betas give its schedule and number of timesteps; it predicts eps.
    for field, value, there in (
        ("diffusion.schedule", "linear", "cosine"),
        ("diffusion.num_timesteps", 500, "1000"),
        ("diffusion.prediction", "v", "eps"),
    ):
        changed = {field.replace(".", "__"): value}
        with pytest.raises(ConfigError, match=re.escape(f"{field} ({there} there, {value} here)")):
            load(init(path, **changed), fresh)
        load(init(path, init__allow=(field,), **changed), fresh)
    torch.save({"model": weights | {"betas": betas * 0.9}}, path)
    with pytest.raises(ConfigError, match="unknown there, cosine here") as error:
        load(init(path), fresh)
    assert "=unknown" not in str(error.value)

    torch.save({"weights": weights}, path)
    with pytest.raises(ConfigError, match="official MaskDM checkpoint"):
        load(init(path), fresh)


def test_the_hint_works_when_typed(workdir):
    with pytest.raises(ConfigError) as error:
        load(init(workdir[0]), small(depth=5))
    hint = re.search(r'--config.init.ignore="(.*?)"', str(error.value))[1]
    params, note = load(init(workdir[0], ignore=ast.literal_eval(hint)), small(depth=5))
    assert "fresh" in note and "in_block_1/qkv/kernel" in note
