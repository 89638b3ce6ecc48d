import pytest

from maskdm_jax import config as config_lib
from maskdm_jax.config import default_config, validate, validate_devices
from maskdm_jax.errors import ConfigError


def changed(**fields):
    config = default_config()
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
        (dict(mask__ratio=float("nan")), "mask.ratio is nan", "--config.mask.ratio=0.95"),
        (dict(diffusion__num_timesteps=10), "diffusion.num_timesteps is 10",
         "--config.diffusion.num_timesteps=50"),
        (dict(sample__steps=2000), "sample.steps is 2000", "--config.sample.steps=1000"),
        (dict(sample__eta=1.5), "sample.eta is 1.5", "--config.sample.eta=1"),
        (dict(sample__guidance_scale=2.0), "sample.guidance_scale is 2.0",
         "--config.sample.guidance_scale=1"),
        (dict(sample__label=3), "sample.label is 3", "--config.sample.label=-1"),
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


def test_sampling_does_not_ask_for_the_training_batch():
    validate_devices(changed(train__batch_size=3), 8, "sample")


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


@pytest.mark.parametrize("name", ["digits", "celeba64", "celebahq"])
@pytest.mark.parametrize("kind", ["pretrain", "finetune", "scratch"])
def test_shipped_configs_are_valid_and_both_stages_share_their_model(name, kind):
    import importlib

    config = importlib.import_module(f"configs.{kind}_{name}").get_config()
    validate(config)
    pretrain = importlib.import_module(f"configs.pretrain_{name}").get_config()
    config_lib.check_same_architecture(config, pretrain, "W")
    assert (config.mask.kind == "none") == (kind != "pretrain")
    assert config.is_locked
