"""Starts of one network from the weights of another: what is restored, resized, left out, fresh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from conftest import zero_state
from flax import traverse_util

from maskdm_jax import checkpoint
from maskdm_jax.config import default_config, validate
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import patches, uvit
from maskdm_jax.weights import start

T = jnp.array([5, 300, 900])


def network(**fields):
    """(config, U-ViT, parameters of which none is zero) of a tiny network."""
    config = default_config()
    config.data.update(image_size=(8, 8), channels=1)
    config.model.update(width=8, depth=3, num_heads=2, patch_size=2, dtype="float32")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    validate(config)
    model = uvit.make_model(config)
    params = uvit.init_params(model, jax.random.key(len(fields)))
    leaves, treedef = jax.tree.flatten(params)
    generator = np.random.default_rng(0)
    leaves = [x + 0.1 * generator.normal(size=x.shape).astype(np.float32) for x in leaves]
    return config, model, jax.tree.unflatten(treedef, leaves)


def started(tmp_path, old, new, **init):
    """(parameters, rows by name, table) of a start of `new` from a checkpoint of `old`.

    The names of what is left out have "left out" before them.
    """
    (config, _, params), (new_config, _, fresh) = old, new
    workdir = tmp_path / str(len(list(tmp_path.iterdir())))
    checkpoints = checkpoint.Checkpoints(workdir, config)
    checkpoints.save(5, zero_state(config).replace(params=params), force=True)
    checkpoints.close()
    new_config.init.update(path=str(workdir), **init)
    validate(new_config)
    made, table = start.load_params(new_config, lambda: fresh)
    rows = {row.name if row.here else f"left out {row.name}": row for row in table.rows}
    assert len(rows) == len(table.rows)
    assert [row.name for row in table.rows if row.here] == list(flat(fresh))
    assert {row.source for row in table.rows} - {""} == flat(params).keys()
    return made, rows, table


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_equal(found, expected, names):
    for name in names:
        np.testing.assert_array_equal(flat(found)[name], flat(expected)[name])


def output(of, params, x_BNP, label_B=None):
    return jax.jit(uvit.apply, static_argnums=0)(of[1], params, x_BNP, T, label_B=label_B)


def images(channels, size=8):
    return jax.random.normal(jax.random.key(1), (3, size, size, channels))


def test_another_resolution_resizes_the_position_rows_alone(tmp_path):
    old, new = network(), network(data__image_size=(16, 16))
    made, rows, table = started(tmp_path, old, new)
    assert {n for n, row in rows.items() if row.outcome != "restored"} == {"position"}
    assert_equal(made, old[2], rows.keys() - {"position"})
    np.testing.assert_array_equal(made["position"][:1], old[2]["position"][:1])
    expected = jax.image.resize(old[2]["position"][1:].reshape(4, 4, 8), (8, 8, 8), "bicubic")
    assert_close(made["position"][1:], expected.reshape(64, 8), 1e-6)
    lines = table.text().splitlines()
    assert re.fullmatch(r"weights from .* \(raw, step 5\): 41 restored, 1 resized", lines[0])
    assert "  position  resized  [17, 8] -> [65, 8]  grid 4 x 4 -> 8 x 8, bicubic" in [
        re.sub(r"   +", "  ", line) for line in lines
    ]
    assert any(re.match(r"  \*_block\*/qkv/kernel +restored \(3\) +\[8, 24\]$", x) for x in lines)
    assert len(lines) < 25 and len(table.text(every=True).splitlines()) == 1 + len(rows)


def test_another_shape_of_the_grid_resizes_positions_though_their_number_is_the_same(tmp_path):
    old, new = network(), network(data__image_size=(4, 16))
    made, rows, _ = started(tmp_path, old, new)
    assert rows["position"].outcome == "resized"
    assert not np.array_equal(made["position"], old[2]["position"])


def test_smaller_patches_keep_the_function_on_images_that_are_constant_on_cells(tmp_path):
    # Images of half the size, so that the grid, and with it every position, stays.
    old, new = network(model__patch_size=4, data__image_size=(16, 16)), network()
    made, rows, table = started(tmp_path, old, new)
    resized = {name for name, row in rows.items() if row.outcome == "resized"}
    assert resized == {"patch_embed/kernel", "output/kernel", "output/bias"}
    assert "patch 4 -> 2" in table.text()
    small = images(1)
    large = small.repeat(2, 1).repeat(2, 2)
    expected = patches.unpatchify(output(old, old[2], patches.patchify(large, 4)), 4, (16, 16))
    found = patches.unpatchify(output(new, made, patches.patchify(small, 2)), 2, (8, 8))
    assert_close(found, expected.reshape(3, 8, 2, 8, 2, 1).mean((2, 4)), 1e-5)


@pytest.mark.parametrize("there, here", [(1, 3), (3, 1)])
def test_between_grey_and_colour_the_function_on_grey_images_is_kept(tmp_path, there, here):
    old, new = network(data__channels=there), network(data__channels=here)
    made, rows, _ = started(tmp_path, old, new)
    assert rows["patch_embed/kernel"].why == f"channels {there} -> {here}"
    grey = images(1)
    expected, found = (
        patches.unpatchify(
            output(each, params, patches.patchify(grey.repeat(n, -1), 2)), 2, (8, 8)
        ).mean(-1)
        for each, params, n in ((old, old[2], there), (new, made, here))
    )
    assert_close(found, expected, 1e-5)


def test_a_class_conditional_network_keeps_all_but_its_class_rows_of_an_unconditional_one(tmp_path):
    old, new = network(), network(model__num_classes=3)
    made, rows, table = started(tmp_path, old, new)
    assert rows["class_embed/embedding"][1:] == ("fresh", "", None, (4, 8), "no classes there")
    assert rows["position"].why == "class row fresh"
    np.testing.assert_array_equal(made["position"][1:], old[2]["position"])
    np.testing.assert_array_equal(made["position"][0], new[2]["position"][0])
    assert_equal(made, new[2], ["class_embed/embedding"])
    assert_equal(made, old[2], rows.keys() - {"position", "class_embed/embedding"})
    assert table.count("restored") == 41 and table.count("fresh") == table.count("resized") == 1


def test_an_unconditional_network_leaves_out_the_class_rows_alone(tmp_path):
    old, new = network(model__num_classes=3), network(data__image_size=(16, 16))
    made, rows, _ = started(tmp_path, old, new)
    assert rows["left out class_embed/embedding"].why == "no classes here"
    assert rows["position"].why == "grid 4 x 4 -> 8 x 8, bicubic; class row left out"
    np.testing.assert_array_equal(made["position"][0], old[2]["position"][1])
    assert made["position"].shape == (65, 8)


@pytest.mark.parametrize("there, here", [(3, 5), (5, 3)])
def test_labels_that_both_networks_have_mean_the_same_and_new_ones_start_as_no_class(
    tmp_path, there, here
):
    old, new = network(model__num_classes=there), network(model__num_classes=here)
    made, rows, _ = started(tmp_path, old, new)
    assert rows["class_embed/embedding"].why == f"classes {there} -> {here}"
    x = patches.patchify(images(1), 2)
    for label_there, label_here in [(0, 0), (2, 2), (there, here)] + [(3, 4)] * (there < here):
        expected = output(old, old[2], x, jnp.full(3, label_there))
        np.testing.assert_array_equal(output(new, made, x, jnp.full(3, label_here)), expected)


def test_a_patch_size_that_no_rule_covers_is_an_error_unless_its_parameters_start_fresh(tmp_path):
    old = network(model__patch_size=4, data__image_size=(24, 24))
    new = network(model__patch_size=6, data__image_size=(24, 24))
    with pytest.raises(ConfigError) as error:
        started(tmp_path, old, new)
    text = str(error.value)
    assert "model.patch_size (4 there, 6 here); type --config.model.patch_size=4" in text
    assert "--config.init.reinit=\"('output/.*', 'patch_embed/kernel',)\"" in text
    named = ("output/.*", "patch_embed/kernel")
    made, rows, _ = started(tmp_path, old, new, reinit=named)
    fresh = {name for name, row in rows.items() if row.outcome == "fresh"}
    assert fresh == {"output/kernel", "output/bias", "patch_embed/kernel"}
    assert_equal(made, new[2], fresh)
    assert_equal(made, old[2], ["patch_embed/bias", "mid_block/qkv/kernel"])


def test_channels_that_no_rule_covers_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="data.channels .3 there, 12 here"):
        started(tmp_path, network(data__channels=3), network(data__channels=12))


def test_a_parameter_that_fits_starts_fresh_if_it_is_named(tmp_path):
    old, new = network(), network(data__image_size=(16, 16))
    made, rows, _ = started(tmp_path, old, new, reinit=("position", "norm/.*"))
    assert [name for name, row in rows.items() if row.why == "init.reinit"] == [
        "norm/bias", "norm/scale", "position"
    ]  # fmt: skip
    assert_equal(made, new[2], ["norm/bias", "norm/scale", "position"])


def test_an_expression_that_names_no_parameter_is_answered_with_the_nearest(tmp_path):
    old, new = network(), network()
    with pytest.raises(ConfigError) as error:
        started(tmp_path, old, new, reinit=("norm/.*", "positon"))
    assert "'positon' matches no parameter of this model" in str(error.value)
    assert "--config.init.reinit=\"('norm/.*', 'position')\"" in str(error.value)


# ------------------------------------------------------------------------------ another depth


def test_another_depth_takes_the_blocks_that_the_map_names(tmp_path):
    old, new = network(model__depth=5), network(model__depth=7)
    made, rows, table = started(tmp_path, old, new, map="in_block=0,1,1 out_block=0,-,1")
    pairs = {
        "in_block_0": "in_block_0", "in_block_1": "in_block_1", "in_block_2": "in_block_1",
        "out_block_0": "out_block_0", "out_block_1": None, "out_block_2": "out_block_1",
        "mid_block": "mid_block",
    }  # fmt: skip
    for block, source in pairs.items():
        expected = old[2][source] if source else new[2][block]
        jax.tree.map(np.testing.assert_array_equal, made[block], expected)
        assert {row.source.partition("/")[0] for name, row in rows.items() if
                name.startswith(f"{block}/")} == {source or ""}  # fmt: skip
    assert rows["in_block_2/qkv/kernel"].source == "in_block_1/qkv/kernel"
    assert "from in_block_1/qkv/kernel" in table.text(every=True)
    assert rows["out_block_1/qkv/kernel"].why == "init.map"


def test_fewer_blocks_leave_the_others_out(tmp_path):
    old, new = network(model__depth=5), network(model__depth=3)
    made, rows, table = started(tmp_path, old, new, map="in_block=1 out_block=0")
    jax.tree.map(np.testing.assert_array_equal, made["in_block_0"], old[2]["in_block_1"])
    left_out = {row.name.partition("/")[0] for row in rows.values() if not row.here}
    assert left_out == {"in_block_0", "out_block_1"}
    assert re.search(r"\*_block\*/qkv/kernel +left out \(2\) .* init.map", table.text())


@pytest.mark.parametrize("there, here", [(3, 7), (7, 3), (5, 7)])
def test_another_depth_without_a_map_is_answered_with_one_that_works(tmp_path, there, here):
    old, new = network(model__depth=there), network(model__depth=here)
    with pytest.raises(ConfigError) as error:
        started(tmp_path, old, new)
    text = str(error.value)
    assert f"model.depth ({there} there, {here} here); type --config.model.depth={there}" in text
    given = re.search(r"--config.init.map='(.*?)'", text)[1]
    made, rows, _ = started(tmp_path, old, new, map=given)
    # The first in-block and the last out-block, which its skip leads to, stay at the ends.
    last = f"out_block_{here // 2 - 1}"
    assert rows["in_block_0/qkv/kernel"].source == "in_block_0/qkv/kernel"
    assert rows[f"{last}/qkv/kernel"].source == f"out_block_{there // 2 - 1}/qkv/kernel"
    sides = {s.partition("=")[0]: s.partition("=")[2].split(",") for s in given.split()}
    skips = [int(a) + int(b) for a, b in zip(sides["in_block"], sides["out_block"][::-1],
                                             strict=True)]  # fmt: skip
    assert set(skips) == {there // 2 - 1}


def test_a_map_that_names_no_block_is_refused(tmp_path):
    old, new = network(model__depth=5), network(model__depth=7)
    with pytest.raises(ConfigError) as error:
        started(tmp_path, old, new, map="in_block=0,1,2 out_block=0,1,1")
    text = str(error.value)
    assert "has no in_block_2; expected blocks up to in_block_1 and out_block_1" in text
    assert "type --config.init.map='in_block=0,0,1 out_block=0,1,1'" in text
    config = new[0]
    for given, said in (
        ("in_block=0,1 out_block=0,1", "expected lists of 3, the blocks on each side"),
        ("blok=0", "expected two lists of block numbers"),
        ("in_block=0,1,1", "expected two lists of block numbers"),
    ):
        config.init.map = given
        with pytest.raises(ConfigError, match=said):
            validate(config)


def test_another_width_is_refused_also_where_a_class_row_would_be_fresh(tmp_path):
    with pytest.raises(ConfigError, match="model.width .8 there, 16 here.; type --config.model.wi"):
        started(tmp_path, network(), network(model__width=16, model__num_classes=3))


def test_haar_coefficients_have_no_rule_for_another_patch(tmp_path):
    old = network(model__wavelet="haar", model__patch_size=4)
    started(tmp_path, old, old)
    with pytest.raises(ConfigError, match="model.patch_size"):
        started(tmp_path, old, network(model__wavelet="haar"))
