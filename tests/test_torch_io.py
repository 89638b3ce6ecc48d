"""Official `.pt` files: read, drawn from, scored and written without PyTorch; what is refused."""

import io
import json
import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, zero_state

import maskdm_jax
from maskdm_jax import checkpoint, evaluate, images, sample
from maskdm_jax.config import default_config, get, validate
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import uvit
from maskdm_jax.weights import export, start, torch_file, torch_io

# What an official file of each kind differs in.
KINDS = {
    "unconditional": {},
    "classes": {"model.num_classes": 5},
    "time MLP": {"model.mlp_time_embed": True},
    "q and v biases": {"model.qkv_bias": True},
    "all": {"model.num_classes": 5, "model.mlp_time_embed": True, "model.qkv_bias": True},
}


def tiny(**fields):
    config = default_config()
    config.data.update(image_size=(16, 16), channels=3)
    config.model.update(width=32, depth=5, num_heads=4, patch_size=4, dtype="float32")
    config.sample.update(num=3, batch_size=8, steps=2)
    config.update_from_flattened_dict(fields)
    validate(config)
    return config


def run(workdir, config):
    """A checkpoint of step 9, whose average differs from its weights; (weights, average)."""
    state, generator = zero_state(config), np.random.default_rng(0)

    def drawn(x):
        return 0.05 * generator.normal(size=x.shape).astype(np.float32)

    params, ema = (jax.tree.map(drawn, state.params) for _ in range(2))
    checkpoints = checkpoint.Checkpoints(workdir, config)
    checkpoints.save(9, state.replace(params=params, ema=ema), force=True)
    checkpoints.close()
    return params, ema


def exported(folder, config, **options):
    """(the file of a checkpoint, its weights, its average)."""
    params, ema = run(folder / "run", config)
    assert export.export(folder / "run", folder / "official.pt", **options) == 9
    return folder / "official.pt", params, ema


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_read_back_from_its_official_file_bit_for_bit(tmp_path, kind):
    config = tiny(**KINDS[kind])
    path, params, ema = exported(tmp_path, config)
    for weights, expected in (("raw", params), ("ema", ema)):
        official = torch_io.load_official(str(path), weights)
        assert_same(official.params, expected)
        assert (official.patch_size, official.channels, official.step) == (4, 3, 9)
    found = torch_io.config_of(official, tiny(**{"model.depth": 9, "data.image_size": (32, 32)}))
    for name in (*KINDS["all"], "model.depth", "model.width", "data.image_size"):
        assert get(found, name) == get(config, name)
    model = maskdm_jax.load(path, fields={"model.num_heads": 4, "model.dtype": "float32"})
    assert model.num_classes == config.model.num_classes and model.step == 9
    assert_same(model.params, ema)
    config.init.path = str(path)
    fresh = uvit.init_params(uvit.make_model(config), jax.random.key(0))
    made, table = start.load_params(config, lambda: fresh)
    assert_same(made, params)
    assert table.count("restored") == len(jax.tree.leaves(params)) == len(table.rows)


def test_labels_of_an_official_file_are_checked_against_its_table(tmp_path):
    path, *_ = exported(tmp_path, tiny(**KINDS["classes"]))
    model = maskdm_jax.load(path, fields={"model.num_heads": 4, "model.dtype": "float32"})
    x = np.zeros((1, 16, 16, 3), np.float32)
    model.predict(x, 3, label=5)  # no class
    with pytest.raises(ConfigError, match="label holds 6; expected 0 to 5"):
        model.predict(x, 3, label=6)
    with pytest.raises(ConfigError, match="label is 5; expected below"):
        model.sample(1, label=5)


def test_every_entry_of_an_official_state_dict_comes_back_in_its_order(official_model):
    with np.load(DATA / "official_uncond_model.npz") as file:
        state = dict(file)
    made = torch_io.to_official(official_model[1], 4, 3)
    network = {name: x for name, x in state.items() if name.startswith("model.")}
    assert [f"model.{name}" for name in made] == list(network)
    for name, array in made.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, state[f"model.{name}"])


def test_the_schedules_tables_are_the_official_ones(golden_schedules):
    for schedule in ("linear", "cosine"):
        config = tiny(**{"diffusion.schedule": schedule})
        tables = export.schedule_tables(config)
        assert {x.dtype for x in tables.values()} == {np.dtype("float32")}
        for name in ("betas", "alphas_cumprod"):
            expected = golden_schedules[f"{schedule}_{name}"].astype(np.float32)
            np.testing.assert_array_equal(tables[name], expected)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_one_kind_of_weights_can_take_both_places(tmp_path, weights):
    path, params, ema = exported(tmp_path, tiny(), weights=weights, loss_weight=True)
    for kind in ("raw", "ema"):
        found = torch_io.load_official(str(path), kind).params
        assert_same(found, params if weights == "raw" else ema)
    tree = torch_file.load(str(path))
    assert (np.asarray(tree["model"]["loss_weight"]) == 1).all()


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path):
    path, *_ = exported(tmp_path, tiny())
    export.export(tmp_path / "run", tmp_path / "again.pt")
    assert path.read_bytes() == (tmp_path / "again.pt").read_bytes()


def test_pooled_tokens_stay_out_of_an_official_file(tmp_path):
    pooled = {"mask.kind": "block", "mask.block_size": 2, "mask.pool_size": 2,
              "mask.hidden": "pool"}  # fmt: skip
    path, params, _ = exported(tmp_path, tiny(**pooled))
    assert "pooled" in params
    params.pop("pooled")
    assert_same(torch_io.load_official(str(path), "raw").params, params)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"diffusion.prediction": "v"}, "diffusion.prediction is v; expected a run with "
         "--config.diffusion.prediction=eps"),
        ({"data.image_size": (16, 32)}, "images of 16 x 32, and the official code knows square"),
    ],
)  # fmt: skip
def test_what_the_official_code_has_no_place_for_is_not_exported(tmp_path, fields, said):
    run(tmp_path, tiny(**fields))
    with pytest.raises(ConfigError, match=said):
        export.export(tmp_path, tmp_path / "official.pt")
    assert not (tmp_path / "official.pt").exists()


# ------------------------------------------------------------------- drawn from, and scored


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_images_are_drawn_straight_from_an_official_file(tmp_path, weights):
    config = tiny(**{"model.num_classes": 5, "sample.weights": weights})
    path, *_ = exported(tmp_path, config)
    expected = sample.write_samples(config, tmp_path / "run")
    config.init.path = str(path)
    folder = sample.write_samples(config, tmp_path / "w")
    assert folder.parent == tmp_path / "w" / "samples"
    assert folder.name.startswith(f"official_step9_{weights}_ddim2_")
    for name in ("000000.png", "000002.png", "grid.png"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    said = json.loads((folder / "settings.json").read_text())
    assert said["init_path"] == str(path) and said["step"] == 9 and len(said["sha256"]) == 64
    # A workdir that has checkpoints is drawn from, whatever its weights started from.
    assert sample.write_samples(config, tmp_path / "run") == expected


def test_other_bytes_of_a_file_get_a_folder_of_their_own(tmp_path):
    config = tiny()
    folders = set()
    for weights in ("both", "ema"):
        (tmp_path / weights).mkdir()
        path, *_ = exported(tmp_path / weights, config, weights=weights)
        config.init.path = str(path)
        folders.add(sample.write_samples(config, tmp_path / "w"))
    assert len(folders) == 2


def test_an_official_file_is_scored(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    for split in ("train", "test"):
        for i, image in enumerate(pixels):
            (tmp_path / split).mkdir(exist_ok=True)
            images.save_png(tmp_path / split / f"{i}.png", image)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(tmp_path.glob("t*/*.png")):
            archive.write(path, path.relative_to(tmp_path))
    config = tiny(**{
        "data.name": str(tmp_path / "set.zip"), "eval.num": 8, "eval.metrics": ("swd",),
    })  # fmt: skip
    path, *_ = exported(tmp_path, config)
    config.init.path = str(path)
    (record,) = evaluate.evaluate(config, tmp_path / "w")
    assert record["step"] == 9 and record["scores"]["swd"] > 0
    assert record["heldout_loss"].keys() == {"ema", "raw"}
    assert f"scoring the official file by 8 images each: {path}" in capsys.readouterr().out
    (expected,) = evaluate.evaluate(config, tmp_path / "run")
    assert record["scores"] == expected["scores"]
    assert record["heldout_loss"] == expected["heldout_loss"]
    assert evaluate.evaluate(config, tmp_path / "w") == [record]
    assert "official.pt is scored already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"model.width": 64}, "model.width (32 there, 64 here); type --config.model.width=32"),
        ({"model.num_classes": 5}, "model.num_classes (0 there, 5 here); type"),
        ({"data.image_size": (32, 32)}, "--config.data.image_size=\"(16, 16)\" to use it"),
        ({"diffusion.schedule": "linear"}, "--config.init.allow=\"('diffusion.schedule',)\""),
        ({"sample.ema_std": 0.1}, "has one average of its own; type --config.sample.ema_std=0"),
    ],
)  # fmt: skip
def test_a_file_of_another_network_than_the_configs_is_not_drawn_from(tmp_path, fields, said):
    path, *_ = exported(tmp_path, tiny())
    config = tiny(**fields)
    config.init.path = str(path)
    with pytest.raises(ConfigError) as error:
        sample.write_samples(config, tmp_path / "w")
    assert said in str(error.value)
    assert not (tmp_path / "w").exists()
    if "diffusion.schedule" in fields:
        config.init.allow = ("diffusion.schedule",)
        sample.write_samples(config, tmp_path / "w")


def test_a_depth_that_builds_the_same_blocks_is_the_same_network(tmp_path):
    path, *_ = exported(tmp_path, tiny())
    config = tiny(**{"model.depth": 4, "init.path": str(path)})
    sample.write_samples(config, tmp_path / "w")


def test_a_file_without_an_average_is_drawn_from_with_its_weights(tmp_path):
    path, params, _ = exported(tmp_path, tiny())
    state = {f"model.{k}": x for k, x in torch_io.to_official(params, 4, 3).items()}
    torch_file.save(str(path), {"model": state})
    config = tiny(**{"init.path": str(path)})
    with pytest.raises(ConfigError, match="no 'ema' entry; .*--config.sample.weights=raw"):
        sample.write_samples(config, tmp_path / "w")
    config.sample.weights = "raw"
    folder = sample.write_samples(config, tmp_path / "w")
    assert folder.name.startswith("official_step0_raw")


def test_a_workdir_without_checkpoints_is_answered_with_the_one_that_it_starts_from(tmp_path):
    run(tmp_path / "run", tiny())
    config = tiny(**{"init.path": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=f"type --workdir={tmp_path / 'run'} to use that run's"):
        sample.write_samples(config, tmp_path / "w")


# --------------------------------------------------------------------- heads, sizes and dtypes


def test_the_heads_of_a_named_size_are_compared(tmp_path):
    mlp = {"mlp_in": {"kernel": np.zeros((512, 2048))}}
    params = {"position": np.zeros((17, 512)), "mid_block": mlp}
    params |= {f"in_block_{i}": {} for i in range(6)}
    official = torch_io.Official(params, None, 4, 3)
    config = tiny(**{"model.width": 512, "model.depth": 13})
    assert torch_io.config_of(official, config).model.num_heads == 8
    params.pop("in_block_5")  # no named size
    assert torch_io.config_of(official, config).model.num_heads == config.model.num_heads


def test_another_resolution_than_the_files_is_resized(tmp_path):
    path, params, _ = exported(tmp_path, tiny())
    config = tiny(**{"data.image_size": (32, 32), "init.path": str(path)})
    fresh = uvit.init_params(uvit.make_model(config), jax.random.key(0))
    made, table = start.load_params(config, lambda: fresh)
    assert table.count("resized") == 1 and "grid 4 x 4 -> 8 x 8" in table.text()
    np.testing.assert_array_equal(made["position"][0], params["position"][0])


def test_bfloat16_numbers_are_read_exactly(tmp_path):
    _, params, _ = exported(tmp_path, tiny())
    state = {
        f"model.{k}": x.astype(jnp.bfloat16) for k, x in torch_io.to_official(params, 4, 3).items()
    }
    torch_file.save(str(tmp_path / "half.pt"), {"model": state})
    found = torch_io.load_official(str(tmp_path / "half.pt"), "raw").params
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), params)
    assert_same(found, rounded)
    assert not np.array_equal(found["position"], params["position"])


# ---------------------------------------------------------------------------- what is refused


class Code:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def zipped(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3")
    return path


@pytest.mark.parametrize(
    "call, said",
    [
        ((os.mkdir, ("executed",)), "an object of posix.mkdir"),
        ((eval, ("__import__('os').mkdir('executed')",)), "an object of builtins.eval"),
        ((getattr, (os, "mkdir")), "an object of"),
        ((io.StringIO, ("x",)), "an object of _io.StringIO"),
    ],
)
def test_a_file_with_code_is_refused_and_nothing_of_it_runs(tmp_path, monkeypatch, call, said):
    monkeypatch.chdir(tmp_path)
    if call[0] is getattr:
        call = (getattr, (Code(os.mkdir, ("executed",)), "mkdir"))
    for protocol in range(5):
        pickled = pickle.dumps({"model": Code(*call)}, protocol)
        with pytest.raises(ValueError, match="loading that could run any code") as error:
            torch_file.load(str(zipped(tmp_path / "code.pt", pickled)))
        assert said.replace("builtins", "__builtin__" if protocol < 3 else "builtins") in str(
            error.value
        )
    assert not (tmp_path / "executed").exists()


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path, *_ = exported(tmp_path, tiny())
    whole, config = path.read_bytes(), tiny(**{"init.path": str(path)})
    for share in (0.0, 0.001, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ConfigError, match=r"is empty|cut short|not a PyTorch checkpoint"):
            start.load_params(config, dict)


def test_one_changed_byte_of_the_numbers_is_noticed(tmp_path):
    path, *_ = exported(tmp_path, tiny())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("archive/data/20").header_offset + 100
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="official.pt: the file is damaged"):
        torch_io.load_official(str(path), "raw")


def test_a_tensor_beyond_its_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="beyond"):
        torch_file.Tensor(torch_file.Storage(np.float32, 6), 1, (2, 3), (3, 1))
    with pytest.raises(ValueError, match="negative"):
        torch_file.Tensor(torch_file.Storage(np.float32, 6), 5, (2, 3), (-3, 1))


def test_another_u_vit_is_refused_with_its_final_convolution(tmp_path):
    path, params, _ = exported(tmp_path, tiny())
    network = torch_io.to_official(params, 4, 3)
    conv = {"final_layer.weight": np.zeros((3, 3, 3, 3), np.float32)}
    said = r"final_layer.weight \[3, 3, 3, 3\], a 3x3 convolution"
    # The state dict alone, with names of its own; and an official one with a layer more.
    bare = {k.replace("encoder.encoder_pos", "pos").replace("encoder.", ""): x
            for k, x in network.items()}  # fmt: skip
    official = {"model": {f"model.{k}": x for k, x in (network | conv).items()}}
    for tree, start_of in ((bare | conv, "no 'model' entry"), (official, "with no place in this")):
        torch_file.save(str(path), tree)
        with pytest.raises(ConfigError, match=f"{start_of}.*{said}") as error:
            start.load_params(tiny(**{"init.path": str(path)}), dict)
        assert len(str(error.value)) < 700
        with pytest.raises(ConfigError, match=said):
            maskdm_jax.load(path, weights="raw")


def test_the_command_line_exports_and_says_what_is_wrong(tmp_path, capsys):
    params, _ = run(tmp_path / "run", tiny())
    out = tmp_path / "official.pt"
    assert export.main(["export", str(tmp_path / "run"), f"--out={out}", "--weights=raw"]) == 0
    assert "wrote step 9" in capsys.readouterr().out
    assert_same(torch_io.load_official(str(out), "ema").params, params)
    assert export.main(["export", str(tmp_path / "run"), f"--out={tmp_path}"]) == 2
    assert "is a folder; expected a file; type --out=" in capsys.readouterr().err
