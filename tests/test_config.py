import json
import re
import subprocess
import sys

import pytest
from conftest import DATA, ROOT

from maskdm_jax import config as config_lib
from maskdm_jax import config_file, optim
from maskdm_jax.config import FIELDS, default_config, get, validate, validate_devices, without_later
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import FREE, MEANING, UPDATE, Role


def changed(**fields):
    config = default_config()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def test_the_defaults_are_valid():
    validate(default_config())
    validate_devices(default_config(), 8, "train")
    validate_devices(default_config(), 8, "sample")


@pytest.mark.parametrize(
    "fields, field, remedy",
    [
        (dict(mask__ratio=0.99), "mask.ratio is 0.99", "--config.mask.ratio=0.95"),
        (dict(mask__ratio=-0.1), "mask.ratio is -0.1", "--config.mask.ratio=0"),
        (dict(mask__kind="stripes"), "mask.kind is 'stripes'", "--config.mask.kind=none"),
        (dict(mask__kind="block", mask__block_size=3), "mask.block_size is 3",
         "--config.mask.block_size=2"),
        (dict(mask__kind="crop", mask__crop_size=17), "mask.crop_size is 17",
         "--config.mask.crop_size=16"),
        (dict(model__patch_size=5), "model.patch_size is 5", "--config.model.patch_size=4"),
        (dict(data__image_size=(64, 62)), "model.patch_size is 4", "--config.model.patch_size=2"),
        (dict(data__channels=13), "data.channels is 13", "--config.data.channels=12"),
        (dict(model__width=30, model__num_heads=4), "model.num_heads is 4",
         "--config.model.num_heads=3"),
        (dict(model__width=30), "model.num_heads is 0", "--config.model.num_heads=10"),
        (dict(seed=-1), "seed is -1", "--config.seed=0"),
        (dict(mask__ratio=float("nan")), "mask.ratio is nan", "--config.mask.ratio=0.9"),
        (dict(optim__lr_peak=float("inf")), "optim.lr_peak is inf",
         "--config.optim.lr_peak=0.0002"),
        (dict(optim__lr_peak=-1.0), "optim.lr_peak is -1.0", "--config.optim.lr_peak=0"),
        (dict(sample__guidance_scale=float("nan")), "sample.guidance_scale is nan",
         "--config.sample.guidance_scale=1.0"),
        (dict(mask__kind="blok"), "mask.kind is 'blok'", "--config.mask.kind=block"),
        (dict(model__attention="hoper"), "model.attention is 'hoper'",
         "--config.model.attention=hopper"),
        (dict(model__patch_size=2.6), "model.patch_size is 2.6", "--config.model.patch_size=3"),
        (dict(data__image_size=(64,)), "data.image_size is (64,)",
         '--config.data.image_size="(64, 64)"'),
        (dict(init__allow=("diffusion.shedule",)), "init.allow is ('diffusion.shedule',)",
         "--config.init.allow=\"('diffusion.schedule',)\""),
        (dict(init__allow=("model.width", "model.numheads")), "init.allow is",
         "--config.init.allow=\"('model.width', 'model.num_heads')\""),
        (dict(model__size="l"), "model.size is 'l'", "--config.model.size=L"),
        (dict(optim__lr_peak=None), "optim.lr_peak is None", "--config.optim.lr_peak=0.0002"),
        (dict(data__image_size=None), "data.image_size is None",
         '--config.data.image_size="(64, 64)"'),
        (dict(init__ignore=None), "init.ignore is None", '--config.init.ignore="()"'),
        (dict(diffusion__num_timesteps=10), "diffusion.num_timesteps is 10",
         "--config.diffusion.num_timesteps=50"),
        (dict(sample__steps=2000), "sample.steps is 2000", "--config.sample.steps=1000"),
        (dict(sample__eta=1.5), "sample.eta is 1.5", "--config.sample.eta=1"),
        (dict(sample__guidance_scale=2.0), "sample.guidance_scale is 2.0",
         "--config.sample.guidance_scale=1"),
        (dict(sample__label=3), "sample.label is 3", "--config.sample.label=-1"),
        (dict(diffusion__loss_weight="min_snr", diffusion__loss="l1"),
         "diffusion.loss_weight is 'min_snr'", "--config.diffusion.loss_weight=uniform"),
        (dict(optim__accumulate_steps=3), "optim.accumulate_steps is 3",
         "--config.optim.accumulate_steps=1"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_what_to_type(fields, field, remedy):
    with pytest.raises(ConfigError) as error:
        validate(changed(**fields))
    assert field in str(error.value) and remedy in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, mode, field, remedy",
    [
        (dict(train__batch_size=20), "train", "train.batch_size is 20",
         "--config.train.batch_size=16"),
        (dict(train__batch_size=24, optim__accumulate_steps=2), "train", "train.batch_size is 24",
         "a multiple of 16"),
        (dict(sample__batch_size=3), "sample", "sample.batch_size is 3",
         "--config.sample.batch_size=8"),
        (dict(mesh__fsdp=3), "train", "mesh.fsdp is 3", "--config.mesh.fsdp=1"),
        (dict(mesh__data=3, mesh__fsdp=2), "train", "mesh.data is 3", "--config.mesh.data=-1"),
    ],
)  # fmt: skip
def test_a_mesh_or_batch_that_does_not_fit_the_devices_is_named(fields, mode, field, remedy):
    with pytest.raises(ConfigError) as error:
        validate_devices(changed(**fields), 8, mode)
    assert field in str(error.value) and remedy in str(error.value)


def test_sampling_does_not_check_the_training_batch():
    validate_devices(changed(train__batch_size=3), 8, "sample")


NUMBERS = [n for n, f in FIELDS.items() if type(f.default) in (int, float)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_must_be_finite_and_the_suggestion_works(name, value):
    config = default_config()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(ConfigError) as error:
        validate(config)
    suggested = re.search(rf"type --config.{name}=(\S+)$", str(error.value))[1]
    config = default_config()
    config.update_from_flattened_dict({name: type(FIELDS[name].default)(suggested)})
    validate(config)


def test_every_field_has_a_kind_that_accepts_its_default_a_role_and_a_meaning():
    leaves = default_config().to_dict()
    flat = [f"{g}.{n}" for g, v in leaves.items() if isinstance(v, dict) for n in v]
    assert sorted([*flat, "seed", "phases", "phases_by"]) == sorted(FIELDS)
    for name, field in FIELDS.items():
        assert field.kind.accepts(field.default), name
        assert isinstance(field.role, Role) and field.kind.expected, name
        assert field.meaning and not field.meaning.endswith("."), name


def test_no_default_changed():
    # Configs stored by earlier versions are filled up from the defaults.
    stored = json.loads((DATA / "default_config.json").read_text())
    config = default_config()
    for name, value in stored.items():
        value = tuple(value) if isinstance(value, list) else value
        assert config_lib.get(config, name) == value, name


def test_differences_are_names_by_role():
    stored = changed(model__size="S", diffusion__prediction="v", optim__lr_peak=1.0, sample__num=3)
    config = default_config()
    assert config_lib.differences(config, stored, [UPDATE]) == ["optim.lr_peak"]
    assert config_lib.differences(config, stored, [FREE]) == ["sample.num"]
    assert config_lib.differences(config, stored, [MEANING]) == [
        "model.num_heads", "diffusion.prediction"
    ]  # fmt: skip
    assert len(config_lib.differences(config, stored)) == 6
    assert config_lib.differences(changed(model__width=768, model__num_heads=12), config) == []


def test_a_config_stored_before_a_field_existed_gets_its_default():
    stored = changed(seed=3).to_dict()
    del stored["sample"]["spacing"], stored["init"]["allow"]
    config = config_lib.from_dict(stored)
    assert config.sample.spacing == "timestep" and config.init.allow == () and config.seed == 3


def test_the_config_needs_no_jax():
    code = "import sys, maskdm_jax.config; print([m for m in ('jax', 'flax') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result


def test_json_keeps_every_field(tmp_path):
    config = changed(mask__ratio=0.5, init__ignore=("position",), data__image_size=(32, 16))
    path = tmp_path / "config.json"
    path.write_text(config_lib.to_json(config))
    assert config_lib.load_json(path).to_dict() == config.to_dict()


def test_another_architecture_is_refused_with_the_flags_that_match():
    stored = changed(model__size="S", diffusion__prediction="v")
    with pytest.raises(ConfigError) as error:
        config_lib.check_same_architecture(default_config(), stored, "W")
    text = str(error.value)
    assert "model.size (S there, B here)" in text
    assert "--config.model.size=S" in text and "--config.diffusion.prediction=v" in text


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"optim__name": "muon"}, "optimizer"),
        ({"diffusion__prediction": "v"}, "noise process"),
        ({"model__size": "S", "optim__ema": "power"}, "architecture and optimizer"),
    ],
)
def test_a_refused_run_is_told_what_differs(fields, words):
    with pytest.raises(ConfigError, match=f"in W has a different {words}: .* or another --workdir"):
        config_lib.check_same_architecture(default_config(), changed(**fields), "W")


STAGES = ("pretrain", "finetune", "scratch")


def shipped(stage, name):
    """The config of a shipped file, as --config=configs/STAGE_NAME, .py:ARGUMENT gives it."""
    name, has_argument, argument = name.partition(":")
    return config_file.load(f"{ROOT}/configs/{stage}_{name}.py{has_argument}{argument}")


@pytest.mark.parametrize(
    "name",
    ["digits", "swiss_roll", "celeba64", "celeba64:paper", "celebahq", "celebahq:paper"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_shipped_configs_are_valid_and_both_stages_share_their_model(stage, name):
    config = shipped(stage, name)
    validate(config)
    config_lib.check_same_architecture(config, shipped("pretrain", name), "W")
    assert (config.mask.kind == "none") == (stage != "pretrain")
    assert config.is_locked


def test_every_config_with_two_recipes_means_ours_if_none_is_typed():
    with_two = [p for p in config_file.shipped() if "paper" in config_file.arguments(p)]
    assert len(with_two) == 6
    for path in with_two:
        assert config_file.arguments(path)[:2] == ("ours", "paper")
        assert config_file.load(path) == config_file.load(f"{path}:ours")


@pytest.mark.parametrize("name", ["celeba64", "celebahq"])
def test_a_second_stage_refuses_the_other_recipes_weights(name):
    for here, there in ((name, f"{name}:paper"), (f"{name}:paper", name)):
        with pytest.raises(ConfigError, match="diffusion.prediction"):
            config_lib.check_same_architecture(
                shipped("finetune", here), shipped("pretrain", there), "W"
            )


def test_the_refusal_of_a_run_names_the_recipe_that_it_has():
    def refused(stored, changes=(), path="configs/finetune_celeba64.py"):
        with pytest.raises(ConfigError) as error, config_file.naming_recipe(path, changes):
            config = config_file.load(path, changes)
            config_lib.check_same_architecture(config, stored, "W")
        return str(error.value)

    paper, hint = shipped("finetune", "celeba64:paper"), "or --config=configs/finetune_celeba64.py:"
    assert refused(paper).endswith(f"{hint}paper, which has these values")
    assert f"{hint}paper" in refused(paper, ["diffusion.prediction=eps"])
    # Another value than either recipe's, one that is typed, and a file without recipes.
    assert hint not in refused(shipped("finetune", "celebahq"))
    assert hint not in refused(paper, ["model.size=B"])
    assert ", or --config=" not in refused(paper, path="configs/finetune_digits.py")


@pytest.mark.parametrize("name", ["celeba64", "celebahq"])
def test_our_rate_falls_to_0_only_at_the_end_of_the_last_stage(name):
    for stage in STAGES:
        config = shipped(stage, name)
        numbers = optim.schedule(config, config.train.num_steps)
        last = 1.2e-4 if stage == "pretrain" else 0
        rates = [
            float(optim.learning_rate(config.optim.lr_schedule, numbers, step))
            for step in (0, 2_000, config.train.num_steps)
        ]
        assert rates == pytest.approx([0, 4e-4, last], rel=1e-4, abs=1e-9)


# The fields of model and diffusion that name scores and folders of samples since the first version.
HASHED = """
    model.size model.width model.depth model.num_heads model.patch_size model.mlp_ratio
    model.qkv_bias model.mlp_time_embed model.num_classes model.class_dropout model.dropout
    model.remat model.attention model.dtype diffusion.schedule diffusion.num_timesteps
    diffusion.prediction diffusion.loss diffusion.loss_weight diffusion.min_snr_gamma
    diffusion.sigmoid_bias diffusion.draw diffusion.draw_mean diffusion.draw_std
    diffusion.input_perturbation
""".split()


def test_hashes_of_earlier_versions_name_the_same_fields():
    groups = ("model.", "diffusion.")
    fields = {name: get(default_config(), name) for name in FIELDS if name.startswith(groups)}
    assert sorted(without_later(fields)) == sorted(HASHED)
    fields = {name: get(default_config(), name) for name in ("model.wavelet", "model.depth")}
    assert without_later(fields) == {"model.depth": 0}
    assert without_later(fields | {"model.wavelet": "haar"}) == fields | {"model.wavelet": "haar"}
