"""A run in phases: its plan, the weights between two phases, and a run that is stopped at each."""

import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from conftest import TINY

from configs import finetune_digits, phases_digits, pretrain_digits
from maskdm_jax import checkpoint, config_file, dry_run, flops, phases, sample, sharding, train
from maskdm_jax import config as config_lib
from maskdm_jax import step as step_lib
from maskdm_jax.data.loader import Order
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import uvit
from maskdm_jax.run import memory
from maskdm_jax.run.preemption import Preempted
from maskdm_jax.run.telemetry import read_metrics
from maskdm_jax.state import init_state
from maskdm_jax.transition import described, enter
from maskdm_jax.weights import resize, rules

MASKED = {"model.patch_size": 4, "mask.ratio": 0.25, "train.batch_size": 24}
WHOLE = {"mask.kind": "none"}
SHORT = WHOLE | {"model.patch_size": 4, "train.batch_size": 8, "optim.lr_schedule": "cosine"}
CARRY = {"optim.moments_at_phase": "keep", "optim.ema_at_phase": "carry"}


def phased(config, *parts, **fields):
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    config.phases = parts
    phases.validate(config)
    return config


def ends(config):
    return [phase.last_step for phase in phases.phases(config)]


# ---------------------------------------------------------------------------------- the plan


def test_a_config_without_phases_is_one_phase_with_that_config(tiny_config):
    (phase,) = phases.phases(tiny_config)
    assert phase.config is tiny_config
    assert (phase.first_step, phase.last_step, phase.first_image) == (0, 1000, 0)


def test_shares_are_relative_and_divide_the_steps(tiny_config):
    config = phased(tiny_config, (3, MASKED), (1, WHOLE), train__num_steps=10)
    first, second = phases.phases(config)
    assert (first.first_step, first.last_step, second.last_step) == (0, 8, 10)  # 7.5 is rounded up
    assert first.config.mask.ratio == 0.25 and second.config.mask.kind == "none"
    assert first.config.phases == () and second.first_image == 8 * 24
    assert [phases.at(config, step).index for step in (0, 1, 8, 9, 10, 99)] == [0, 0, 0, 1, 1, 1]


def test_shares_of_flops_give_each_phase_its_share_of_them(tiny_config):
    config = phased(tiny_config, (1, MASKED), (2, WHOLE), phases_by="flops")
    every = phases.phases(config)
    first, whole = (flops.work(every, step).flops for step in ends(config))
    assert ends(config)[1] == config.train.num_steps
    assert first / whole == pytest.approx(1 / 3, rel=0.005)


def test_the_suggested_number_of_steps_gives_each_phase_one(tiny_config):
    parts = (7.0, {}), (0.1, {}), (0.3, WHOLE)
    with pytest.raises(ConfigError, match="phase 2 of phases gets none") as error:
        phased(tiny_config, *parts, train__num_steps=20)
    tiny_config.train.num_steps = int(re.search(r"num_steps=(\d+)", str(error.value))[1])
    assert sorted(set(ends(tiny_config))) == ends(tiny_config)


def test_the_average_starts_anew_with_a_phase_unless_it_is_carried_over(tiny_config):
    carried = phased(tiny_config, (1, {}), (1, {}), (1, CARRY), train__num_steps=9)
    assert [phase.ema_first_step for phase in phases.phases(carried)] == [0, 3, 3]
    carried.optim.ema = "power"
    assert [phase.ema_first_step for phase in phases.phases(carried)] == [0, 3, 6]


def test_no_example_is_read_twice_in_an_epoch_though_the_batch_changes(tiny_config):
    config = phased(tiny_config, (1, MASKED), (1, WHOLE), (1, SHORT), train__num_steps=9)
    order, read = Order(0, 40), []
    for phase in phases.phases(config):
        for step in range(phase.first_step, phase.last_step):
            count = phase.images(step + 1) - phase.images(step)
            assert count == phase.config.train.batch_size
            read.append(order.ids(phase.images(step), count))
    read = np.concatenate(read)[:120].reshape(3, 40)
    assert (np.sort(read, axis=1) == np.arange(40)).all()


def test_json_and_the_command_line_keep_phases(tiny_config):
    text = "[(0.6, {'mask.kind': 'block', 'mask.block_size': 2}), (0.4, {'optim.lr_peak': 1})]"
    config_file.set_field(tiny_config, f"phases={text}")
    assert tiny_config.phases[1] == (0.4, {"optim.lr_peak": 1})
    again = config_lib.from_dict(json.loads(config_lib.to_json(tiny_config)))
    assert again.phases == tiny_config.phases
    assert type(phases.phases(again)[1].config.optim.lr_peak) is float


def test_a_typed_field_that_every_phase_sets_is_refused(tmp_path):
    changes = ["phases=((1, {'mask.ratio': 0.5}), (1, {'mask.ratio': 0.25}))", "mask.ratio=0.75"]
    with pytest.raises(ConfigError, match="each of phases sets mask.ratio") as error:
        config_file.load("configs/pretrain_digits.py", changes)
    fixed = re.search(r'--config.(phases="(.*)")', str(error.value))[2]
    assert config_file.load("configs/pretrain_digits.py", [f"phases={fixed}"])


def test_a_config_file_with_arguments_makes_the_one_that_is_typed(tmp_path):
    path = tmp_path / "variants.py"
    path.write_text(
        "from configs import pretrain_digits\n"
        "ARGUMENTS = ('ours', 'paper')\n"
        "def get_config(argument):\n"
        "    config = pretrain_digits.get_config()\n"
        "    config.seed = ARGUMENTS.index(argument)\n"
        "    return config\n"
    )
    assert config_file.load(f"{path}").seed == 0
    assert config_file.load(f"{path}:paper").seed == 1
    with pytest.raises(ConfigError, match=f"one of ours, paper; type --config={path}:paper$"):
        config_file.load(f"{path}:papr")
    with pytest.raises(ConfigError, match="takes none"):
        config_file.load("configs/pretrain_digits.py:paper")


def test_the_phases_of_the_digits_are_the_two_stages():
    config = phases_digits.get_config()
    phases.validate(config)
    stages = pretrain_digits.get_config(), finetune_digits.get_config()
    for phase, stage in zip(phases.phases(config), stages, strict=True):
        assert phase.num_steps == stage.train.num_steps
        different = {"train.num_steps", "train.sample_every_steps", "phases"}
        different |= {f"sample.{name}" for name in ("sampler", "steps", "guidance_scale")}
        different |= {f"eval.{name}" for name in ("num", "metrics", "heldout_split")}
        assert set(config_lib.differences(phase.config, stage)) <= different


# ------------------------------------------------------------------------------- the weights


def network(patch_size, side):
    config = config_lib.default_config()
    config.data.update(image_size=(side, side), channels=2)
    config.model.update(width=16, depth=1, num_heads=2, patch_size=patch_size, dtype="float32")
    model = uvit.make_model(config, sharding.make_mesh(config, jax.devices()[:1]))
    return config, model, uvit.init_params(model, jax.random.key(patch_size))


def carried(params, fresh, old, new):
    theirs, ours = rules.by_name(params), rules.by_name(fresh)
    rows, problems = rules.plan(theirs, ours, old, new, {}, lambda name: "", lambda name: False)
    assert not problems
    made = rules.carried(rows, theirs, ours, old, new)
    return jax.tree.unflatten(jax.tree.structure(fresh), [made[name] for name in ours])


def by_cells(x, p, q):
    """Means over cells of patches [..., p x p x 2], or (q > p) each value repeated in a cell."""
    if q < p:
        shape = (*x.shape[:-1], q, p // q, q, p // q, 2)
        return x.reshape(shape).mean((-4, -2)).reshape(*x.shape[:-1], -1)
    x = x.reshape(*x.shape[:-1], p, p, 2).repeat(q // p, -3).repeat(q // p, -2)
    return x.reshape(*x.shape[:-3], -1)


@pytest.mark.parametrize("large, small", [(4, 2), (6, 2)])
def test_patches_that_are_constant_on_cells_give_the_same_outputs_at_either_size(large, small):
    # Images of another size, so that the grid, and with it every position, stays.
    (big, big_model, big_params) = network(large, 2 * large)
    (little, little_model, little_params) = network(small, 2 * small)
    x = jax.random.normal(jax.random.key(0), (3, 4, small**2 * 2))
    repeated, t = by_cells(x, small, large), jnp.array([5, 300, 900])
    apply = jax.jit(uvit.apply, static_argnums=0)
    geometries = resize.geometry(big), resize.geometry(little)

    shrunk = carried(big_params, little_params, *geometries)
    expected = by_cells(apply(big_model, big_params, repeated, t), large, small)
    assert_close(apply(little_model, shrunk, x, t), expected, 1e-5)

    grown = carried(little_params, big_params, *geometries[::-1])
    expected = by_cells(apply(little_model, little_params, x, t), small, large)
    assert_close(apply(big_model, grown, repeated, t), expected, 1e-5)
    back = carried(grown, little_params, *geometries)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), back, little_params)


def test_position_rows_are_interpolated_and_those_of_time_and_class_are_kept():
    old, new = resize.Geometry((4, 6), 4), resize.Geometry((8, 12), 2)
    extra, rows = np.full((2, 3), 7.0), np.add.outer(np.arange(4.0), np.arange(6.0) * 10)
    table = np.concatenate([extra, np.repeat(rows.reshape(-1, 1), 3, 1)]).astype(np.float32)
    made = np.asarray(resize.resized("position", table, old, new))
    np.testing.assert_array_equal(made[:2], 7)
    # Between samples, a bicubic curve through a line is that line; the centres are half as far.
    inner = made[2:, 0].reshape(8, 12)[3:5, 3:9]
    assert_close(inner, np.add.outer([1.25, 1.75], np.arange(1.25, 4, 0.5) * 10), 1e-5)


def test_weights_of_one_phase_alone_are_left_out_or_fresh(tiny_config):
    pooled = {"mask.kind": "block", "mask.hidden": "pool", "mask.ratio": 0.5}
    config = phased(tiny_config, (1, pooled), (1, WHOLE), (1, pooled), model__depth=1)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    first, second, third = phases.phases(config)
    assert "0 fresh" in described(second, first, mesh)
    assert re.search(r"\d left out \(pooled/", described(second, first, mesh))
    assert re.search(r"0 left out, \d fresh \(pooled/", described(third, second, mesh))


# --------------------------------------------------------------------------------- the runs


def moments(state):
    adam = state.opt_state[1][0]
    return adam.mu, adam.nu


@pytest.fixture
def at_a_boundary(tiny_config):
    """A function of fields of the second phase that gives the state with which it starts."""

    def made(**changes):
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        parts = (1, MASKED), (1, WHOLE | changes)
        config = phased(tiny_config, *parts, train__num_steps=6, model__depth=1)
        first, second = phases.phases(config)
        mesh = sharding.make_mesh(config, jax.devices()[:1])
        state = init_state(first.config, mesh)
        ones = jax.tree.map(jnp.ones_like, state.opt_state)
        state = state.replace(
            step=jnp.int32(3), opt_state=ones, ema=jax.tree.map(lambda x: 2 * x, state.params)
        )
        return enter(second, first, state, mesh)

    return made


def test_a_phase_starts_with_zero_moments_and_the_raw_weights_as_average(at_a_boundary):
    state = at_a_boundary()
    assert int(state.step) == 3
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


def test_a_phase_can_keep_moments_and_carry_the_average_over(at_a_boundary):
    state = at_a_boundary(optim__moments_at_phase="keep", optim__ema_at_phase="carry")
    jax.tree.map(lambda ema, raw: assert_close(ema, 2 * raw, 1e-6), state.ema, state.params)
    for tree in moments(state):
        assert np.all(tree["mid_block"]["qkv"]["kernel"] == 1)
        assert not np.any(tree["patch_embed"]["kernel"])  # of another shape
    assert int(state.opt_state[1][0].count) == 1  # Adam's


def three_phases(config):
    config.model.depth = 1
    config.optim.update(warmup_steps=1, ema_ramp=False)
    config.checkpoint.update(every_steps=3, keep_last=20)
    parts = (1, MASKED), (1, WHOLE), (1, SHORT | CARRY)
    return phased(config, *parts, train__num_steps=9)


@pytest.fixture(scope="module")
def calm(request, data_dir, tmp_path_factory):
    """The workdir of an undisturbed run in three phases."""
    config = pretrain_digits.get_config()
    config.update_from_flattened_dict(TINY)
    config.data.dir, config.train.log_every_steps = str(data_dir), 1
    workdir = tmp_path_factory.mktemp("calm")
    train.train(three_phases(config), workdir)
    return workdir


def test_a_run_stopped_before_at_and_after_a_boundary_ends_like_an_undisturbed_one(
    tiny_config, calm, tmp_path
):
    config = three_phases(tiny_config)
    for stop in (2, 3, 4, 6):
        with pytest.raises(Preempted):
            train.train(config, tmp_path, lambda step, stop=stop: step == stop)
    train.train(config, tmp_path)
    for step in (3, 6, 9):
        assert checkpoint.digest(tmp_path, step) == checkpoint.digest(calm, step)
    losses = [[(r["step"], r["loss"]) for r in read_metrics(w)] for w in (tmp_path, calm)]
    assert losses[0] == losses[1]


def test_phases_that_differ_in_rate_and_levels_alone_share_one_program(
    tiny_config, tmp_path, monkeypatch
):
    made, original = [], step_lib.make_train_step

    def make_train_step(*given):
        made.append(given)
        return original(*given)

    monkeypatch.setattr(step_lib, "make_train_step", make_train_step)
    levels = {"diffusion.draw": "logit_normal", "optim.lr_peak": 5e-4}
    narrow = levels | {"diffusion.draw_std": 0.5, "optim.lr_peak": 1e-3}
    tiny_config.update_from_flattened_dict(WHOLE)
    tiny_config.train.sample_every_steps = 0
    parts = (1, levels), (1, narrow), (1, narrow | {"diffusion.draw": "uniform"})
    train.train(phased(tiny_config, *parts, train__num_steps=3), tmp_path)
    assert len(made) == 2


def test_records_have_the_work_and_the_learning_rate_of_their_phases(calm):
    records = read_metrics(calm)
    assert [r["images"] for r in records] == [24, 48, 72, 88, 104, 120, 128, 136, 144]
    assert [r["tokens"] for r in records][2:4] == [72 * 5, 72 * 5 + 16 * 18]
    rates = [r["lr"] for r in records]
    assert_close(np.array(rates[:6]), np.array([0, 2e-3, 2e-3] * 2), 1e-6)
    assert_close(np.array(rates[6:]), np.array([0, 2e-3, 1e-3]), 1e-6)  # cosine over 2 updates


def test_a_checkpoint_is_drawn_with_the_network_of_its_phase(tiny_config, calm):
    config = three_phases(tiny_config)
    config.sample.update(num=2, steps=2)
    folders = {sample.write_samples(config, calm, step) for step in (3, 6)}
    assert all(len(list(folder.glob("0*.png"))) == 2 for folder in folders) and len(folders) == 2
    config.phases = ()  # what the checkpoint stores counts
    assert sample.write_samples(config, calm, 3) in folders
    config.model.width = 64
    refusal = r"model.width \(32 there, 64 here\).* or the --workdir of another run$"
    with pytest.raises(ConfigError, match=refusal):
        sample.write_samples(config, calm, 3)


def test_changed_phases_are_accepted_if_the_stored_state_fits(tiny_config, calm, capsys):
    config = three_phases(tiny_config)
    stored = checkpoint.load_config(calm, 6)
    config.phases = ((2, MASKED), (7, WHOLE))
    phases.check_resumes(config, stored, 6, "W")
    config.phases = ((7, MASKED), (2, WHOLE))
    with pytest.raises(ConfigError, match=r"model.patch_size \(2 there, 4 here\)") as error:
        phases.check_resumes(config, stored, 6, "W")
    fixed = re.search(r'--config.phases="(.*)" to use it', str(error.value))[1]
    config_file.set_field(config, f"phases={fixed}")
    phases.check_resumes(config, stored, 6, "W")


def test_a_run_that_more_steps_send_back_to_an_earlier_phase_says_how_to_go_on(tiny_config):
    stored = phased(tiny_config, (1, MASKED), (1, WHOLE), train__num_steps=6)
    longer = stored.copy_and_resolve_references()
    assert not phases.going_back(longer, stored, 6) and not phases.going_back(longer, stored, 2)
    longer.train.num_steps = 24
    for others in ((), ((1, WHOLE), (1, {}))):  # typed on purpose
        typed = longer.copy_and_resolve_references()
        typed.phases = others
        assert not phases.going_back(typed, stored, 6)
    says = phases.going_back(longer, stored, 6)
    assert "step 6 is from phase 2, but here phase 1 lasts until step 12" in says
    for name, value in re.findall(r'--config.(\S+?)="?(.*?)"?(?= --|$)', says):
        config_file.set_field(longer, f"{name}={value}")
    assert [(p.first_step, p.last_step) for p in phases.phases(longer)] == [(0, 3), (3, 24)]
    assert not phases.going_back(longer, stored, 6)


def test_a_dry_run_has_the_figures_of_each_phase(tiny_config, monkeypatch, capsys):
    compiled = types.SimpleNamespace(compile=lambda: None)
    monkeypatch.setattr(dry_run, "lower_train_step", lambda phase, mesh, num: compiled)
    monkeypatch.setattr(dry_run, "bytes_needed", lambda compiled: 2**40)
    dry_run.dry_run(three_phases(tiny_config), 100)
    out = capsys.readouterr().out
    for number, steps, batch in ((1, "1 to 3", 24), (2, "4 to 6", 16), (3, "7 to 9", 8)):
        assert re.search(rf"phase {number}, steps {steps}\nbatch +{batch}: ", out)


def test_a_run_out_of_memory_in_a_phase_is_sent_to_the_dry_run(tiny_config):
    with pytest.raises(ConfigError, match="one of the phases .* --config.train.dry_run=True"):
        with memory.explained(three_phases(tiny_config), "train"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 GiB")


def test_power_averages_do_not_go_on_from_another_boundary(tiny_config):
    stored = phased(tiny_config, (1, MASKED), (2, MASKED), train__num_steps=6, optim__ema="power")
    longer = stored.copy_and_resolve_references()
    longer.train.num_steps = 12
    with pytest.raises(ConfigError, match="--config.train.num_steps=6 to go on with them"):
        phases.check_resumes(longer, stored, 6, "W")
    longer.phases = ((2, MASKED), (10, MASKED))
    phases.check_resumes(longer, stored, 6, "W")


def test_fine_tuning_does_not_resume_a_masked_run_in_phases(tiny_config, tmp_path):
    config = phased(tiny_config, (1, {}), (1, {"optim.lr_peak": 1e-3}), train__num_steps=2)
    config.train.sample_every_steps = 0
    train.train(config, tmp_path / "W")
    config.phases, config.mask.kind, config.train.num_steps = (), "none", 4
    with pytest.raises(ConfigError, match="holds a run with 'patch'"):
        train.train(config, tmp_path / "W")


def test_malformed_phases_of_a_file_are_explained_beside_a_typed_field(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from configs import pretrain_digits\n\n"
        "def get_config():\n"
        "    config = pretrain_digits.get_config()\n"
        "    config.phases = ((3,),)\n"
        "    return config\n"
    )
    with pytest.raises(ConfigError, match="phases is"):
        config_file.load(str(path), ["seed=1"])
