"""Every file in configs/ with every argument: its values, and one update of a shrunken copy."""

import ast
import re

import jax
import numpy as np
import pytest
from conftest import ROOT

from maskdm_jax import config as config_lib
from maskdm_jax import config_file, sharding, step
from maskdm_jax.config import MEANING, SHAPE, default_config
from maskdm_jax.errors import ConfigError
from maskdm_jax.phases import phases
from maskdm_jax.state import abstract_state

FILES = [file.removeprefix("configs/").removesuffix(".py") for file in config_file.shipped()]
RECIPES = [
    f"{file}:{argument}" if argument else file
    for file in FILES
    for argument in config_file.arguments(f"configs/{file}.py") or ("",)
]


# The paper's: size, mask, batch, learning rate, warm-up, clipping, schedule, flips, updates (None
# if they are ours).
PAPER = {
    "pretrain_celebahq:paper": ("B", "block4,0.9", 256, 2e-4, 0, 1, "cosine", False, 200_000),
    "pretrain_celebahq:paper_50": ("B", "block4,0.5", 64, 2e-4, 5_000, 1, "cosine", False, None),
    "finetune_celebahq:paper": ("B", "none", 32, 1e-5, 5_000, 1, "cosine", False, 550_000),
    "scratch_celebahq:paper": ("B", "none", 32, 2e-4, 5_000, 1, "cosine", False, 940_000),
    "lsun_church:finetune": ("B", "none", 64, 1e-4, 5_000, 1, "linear", True, None),
    "pretrain_vggface2": ("S", "block4,0.9", 256, 2e-4, 0, 1, "cosine", False, 200_000),
    "transfer_celebahq:0.1": ("S", "none", 64, 5e-5, 0, 0, "cosine", True, None),
    "transfer_celebahq:0.01": ("S", "none", 64, 5e-5, 0, 0, "cosine", True, None),
    "pretrain_celeba64:paper": ("S", "block2,0.9", 256, 2e-4, 0, 0, "linear", False, 200_000),
    "finetune_celeba64:paper": ("S", "none", 128, 2e-4, 0, 0, "linear", False, None),
    "scratch_celeba64:paper": ("S", "none", 128, 2e-4, 0, 0, "linear", False, None),
    **{
        f"ablation_celeba64:{mask}": ("S", mask, 256, 2e-4, 0, 0, "linear", False, 200_000)
        for mask in config_file.arguments("ablation_celeba64")
    },
}

# Stage 2 of each recipe's stage 1.
SECOND_STAGES = {
    **{file: f"finetune_{file[9:]}" for file in RECIPES if file.startswith("pretrain_")},
    **{f"ablation_celeba64:{m}": "finetune_celeba64:paper" for m in ("block2,0.1", "crop,0.5")},
    **{f"{file}:pretrain": f"{file}:finetune" for file in ("cifar10", "imagenet64", "lsun_church")},
    "pretrain_celebahq:paper_50": "finetune_celebahq:paper",
    "pretrain_vggface2": "transfer_celebahq:0.01",
}

# "configs/FILE.py:ARGUMENT", and commands without their continuation over lines.
NAMED = r"configs/\w+\.py(?::[\w.,]*\w)?"
TYPED = r"python main\.py ((?:--\S+ ?)+)"


def load(recipe, *changes):
    """The config of FILE or FILE:ARGUMENT in configs/."""
    return config_file.load(recipe, changes)


def drawn_mask(config):
    """The mask in the words of configs/ablation_celeba64.py."""
    mask = config.mask
    if mask.kind == "crop":  # the windows nearest to 10, 50 and 90 % hidden
        return f"crop,{ {15: 0.1, 11: 0.5, 5: 0.9}[mask.crop_size] }"
    size = mask.block_size if mask.kind == "block" else ""
    return "none" if mask.kind == "none" else f"{mask.kind}{size},{mask.ratio}"


@pytest.mark.parametrize("recipe", PAPER)
def test_a_recipe_of_the_paper_has_its_values(recipe):
    config = load(recipe)
    size, mask, batch, peak, warmup, clip, schedule, flip, steps = PAPER[recipe]
    expected = default_config()
    expected.model.size, expected.diffusion.schedule = size, schedule
    expected.optim.update(lr_peak=peak, warmup_steps=warmup, clip_norm=float(clip))
    for group in ("model", "diffusion", "optim"):
        assert config[group] == expected[group]
    assert (drawn_mask(config), config.train.batch_size, config.data.flip) == (mask, batch, flip)
    assert steps in (None, config.train.num_steps)


@pytest.mark.parametrize("recipe", PAPER)
def test_a_recipe_of_the_paper_draws_as_the_official_sampler(recipe):
    config = load(recipe)
    names = ("sampler", "spacing", "steps", "eta", "threshold", "guidance_scale", "weights")
    assert {name: config.sample[name] for name in names} == {
        "sampler": "ddim", "spacing": "timestep", "steps": 250, "eta": 1, "threshold": 0,
        "guidance_scale": 1, "weights": "ema",
    }  # fmt: skip
    assert config.sample.recompute_eps == (config.diffusion.prediction != "eps")


@pytest.mark.parametrize("first", SECOND_STAGES)
def test_a_second_stage_takes_the_weights_and_the_set_of_its_first(first):
    here, there = load(SECOND_STAGES[first]), load(first)
    assert config_lib.differences(here, there, (SHAPE, MEANING)) == []
    assert there.mask.kind != "none" and here.mask.kind == "none"
    assert there.train.sample_every_steps == 0
    assert here.data.name == there.data.name or first == "pretrain_vggface2"


@pytest.mark.parametrize("file", FILES)
def test_what_a_header_says_to_type_is_accepted(file):
    header = ast.get_docstring(ast.parse((ROOT / f"configs/{file}.py").read_text()))
    for name in re.findall(NAMED, header):
        load(name)
    commands = re.findall(TYPED, re.sub(r"\n +--", " --", header))
    assert commands and any(f"configs/{file}.py" in command for command in commands)
    for command in commands:
        flags = dict(flag.split("=", 1) for flag in command.split())
        assert flags.keys() >= {"--config", "--workdir"}
        changes = [f"{name[9:]}={x}" for name, x in flags.items() if name.startswith("--config.")]
        load(flags["--config"], *changes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_page_on_slices_has_a_row_for_each_recipe_or_one_that_stands_for_it(recipe):
    page = (ROOT / "docs/tpu.md").read_text()
    row = "ablation_celeba64:block4,0.9" if recipe.startswith("ablation") else recipe
    has_row = re.search(rf"^\| {row}(, phase 1)? \| v5e-16 ", page, re.M)
    assert has_row or f"row for `{recipe}`" in page


def test_a_wrong_argument_is_answered_with_the_nearest():
    for typed, near in {
        "ablation_celeba64.py:blok4": "ablation_celeba64.py:block4,0",
        "ablation_celeba64:block8,0.1": "ablation_celeba64:block8,0",
        "cifar10:finetun": "cifar10:finetune",
        "transfer_celebahq:10": "transfer_celebahq:0.1",
    }.items():
        with pytest.raises(ConfigError, match=f"expected one of .*type --config=.*{near}"):
            load(f"configs/{typed}" if ".py" in typed else typed)


def shrunken(config):
    """A small copy: it has the recipe's masks, losses and optimizer, but one narrow block, a few
    classes and one learning rate, so that many recipes are the same program."""
    config = config.copy_and_resolve_references()
    height, width = config.data.image_size
    config.data.image_size = (min(height, 64), min(width, 64))
    config.data.cache = "host"
    config.model.update(size="S", width=16, depth=1, num_heads=2, dtype="float32")
    config.model.num_classes = min(config.model.num_classes, 10)
    config.train.update(batch_size=4, num_steps=10)
    config.optim.update(lr_peak=1e-3, warmup_steps=0, lr_schedule="constant", lr_end=0.0)
    return config


def program(phase):
    """What one update of a phase depends on: recipes that share it need one run."""
    fields = phase.config.to_dict()
    if phase.config.mask.kind == "none":
        fields.pop("mask")
    for free in ("data", "mesh", "train", "sample", "eval", "checkpoint", "init", "log"):
        fields.pop(free)
    data = phase.config.data
    return repr((sorted(fields.items()), data.image_size, data.channels, data.flip, phase[:3]))


def update(phase):
    """The metrics of a phase's first update from fresh weights, on random images."""
    config, mesh = phase.config, sharding.make_mesh(phase.config, jax.devices()[:1])
    generator = np.random.default_rng(0)
    state = jax.tree.map(  # random weights that need no compilation
        lambda x: jax.device_put(0.1 * generator.standard_normal(x.shape), x.sharding).astype(
            x.dtype
        ),
        abstract_state(config, mesh),
    )
    shape = (config.train.batch_size, *config.data.image_size, config.data.channels)
    batch = {
        "image": generator.integers(0, 256, shape, dtype=np.uint8),
        "label": np.arange(shape[0], dtype=np.int32),
    }
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, metrics = step.jit_train_step(phase, mesh)(state, {}, batch, step.planned(phase, mesh))
    return jax.tree.map(float, metrics) | {"step": int(state.step)}


@pytest.fixture(scope="module")
def updates():
    """The metrics of each program, once it has run."""
    return {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shrunken_copy_of_each_recipe_takes_a_step(recipe, updates):
    for phase in phases(shrunken(load(recipe))):
        key = program(phase)
        if key not in updates:
            updates[key] = update(phase)
        assert updates[key]["step"] == 1 and not updates[key]["skipped"]
        assert 0.3 < updates[key]["loss"] < 2
