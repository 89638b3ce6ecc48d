"""The update on 8 devices: sharding, accumulation, and what it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from maskdm_jax import draw, optim, sharding, step
from maskdm_jax.data import batch as batch_lib
from maskdm_jax.diffusion import make_process
from maskdm_jax.model import patches
from maskdm_jax.phases import Phase, phases
from maskdm_jax.state import abstract_state, fresh_params, init_state

STEPS = 20
PINNED_LOSSES = [0.9510877, 0.9951195, 0.9362011]
# How far three updates move the parameters and their EMA, and the norm of the optimizer's moments.
PINNED_NORMS = [0.7112283, 0.4171179, 0.2626676]


def mesh_of(config, num_devices):
    return sharding.make_mesh(config, jax.devices()[:num_devices])


def curve(config, num_devices=8, steps=STEPS):
    """Losses and final parameters of a short run on random images."""
    mesh = mesh_of(config, num_devices)
    phase, state = phases(config)[0], init_state(config, mesh)
    update, plan = step.jit_train_step(phase, mesh), step.planned(phase, mesh)
    generator = np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        batch = {
            "image": generator.integers(
                0, 256, (16, *config.data.image_size, config.data.channels), dtype=np.uint8
            ),
            "label": generator.integers(0, 10, (16,), dtype=np.int32),
        }
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        state, metrics = update(state, {}, batch, plan)
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.fixture(scope="module")
def reference(request):
    """Filled by the first test that needs it: the curve on one device."""
    return {}


@pytest.mark.parametrize(
    "num_devices, fields",
    [
        (8, {}),
        (8, {"mesh.fsdp": 2}),
        (8, {"mesh.fsdp": 8}),
        (1, {"optim.accumulate_steps": 4}),
    ],
    ids=["8-devices", "data-4-fsdp-2", "fsdp-8", "accumulate-4"],
)
def test_loss_curve_is_that_of_one_device(tiny_config, reference, num_devices, fields):
    if not reference:
        reference["losses"], reference["state"] = curve(tiny_config, 1)
    tiny_config.update_from_flattened_dict(fields)
    losses, state = curve(tiny_config, num_devices)
    assert_close(losses, reference["losses"], 1e-5)
    assert int(state.step) == STEPS
    assert losses[-5:].mean() < losses[:2].mean()


def test_a_narrow_h_trains_split_over_8_devices(tiny_config):
    # An eighth of H's width, which divides as H's own does.
    tiny_config.model.update(width=1152 // 8, num_heads=16)
    whole, _ = curve(tiny_config, 1, steps=2)
    tiny_config.mesh.fsdp = 8
    split, state = curve(tiny_config, 8, steps=2)
    assert_close(split, whole, 1e-5)
    assert not state.params["out_block_0"]["skip"]["kernel"].sharding.is_fully_replicated


@pytest.mark.slow
def test_l_itself_takes_a_step_split_over_8_devices(tiny_config):
    tiny_config.model.update(size="L", width=0, num_heads=0, depth=0, patch_size=4)
    tiny_config.mesh.fsdp = 8
    losses, state = curve(tiny_config, steps=1)
    assert int(state.step) == 1 and abs(losses[0] - 1) < 0.5
    kernel = state.params["in_block_9"]["mlp_in"]["kernel"]
    assert kernel.shape == (1024, 4096) and kernel.addressable_data(0).shape == (1024, 512)


def test_fsdp_splits_kernels_ema_and_moments(tiny_config):
    tiny_config.mesh.fsdp = 8
    abstract = abstract_state(tiny_config, sharding.make_mesh(tiny_config))
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    def split(tree):
        kernel = tree["mid_block"]["qkv"]["kernel"]
        return not kernel.is_fully_replicated

    moments = [s for s in jax.tree.leaves(shardings.opt_state) if not s.is_fully_replicated]
    assert split(shardings.params) and split(shardings.ema) and moments
    assert shardings.params["norm"]["scale"].is_fully_replicated


def drawn(config, batch, number=0):
    process = make_process(config.diffusion, config.data.image_size)
    return step.draw_examples(config, process, batch, config.seed, jnp.int32(number))


def test_draws_are_fresh_each_step_and_repeat_for_the_same_step(tiny_config):
    tiny_config.data.flip = True
    tiny_config.model.class_dropout = 0.5
    batch = {
        "image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)), jnp.uint8),
        "label": jnp.zeros((16,), jnp.int32),
    }
    first, again, later = (drawn(tiny_config, batch, n) for n in (3, 3, 4))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        assert (np.asarray(value) != np.asarray(later[name])).any(), name
    assert first["x0"].shape == first["eps"].shape == (16, 8, 4)
    assert first["visible"].shape == (16, 8)
    assert np.abs(first["x0"]).max() <= 1


def test_input_noise_is_drawn_only_if_the_input_is_perturbed(tiny_config):
    batch = {"image": jnp.zeros((64, 8, 8, 1), jnp.uint8), "label": jnp.zeros((64,), jnp.int32)}
    plain = drawn(tiny_config, batch)
    tiny_config.diffusion.input_perturbation = 0.1
    perturbed = drawn(tiny_config, batch)
    xi = np.asarray(perturbed.pop("input_eps") - perturbed["eps"]) / 0.1
    for name, value in plain.items():  # every other number is the same
        np.testing.assert_array_equal(value, perturbed[name])
    assert plain.keys() == perturbed.keys()
    correlation = np.corrcoef(xi.ravel(), np.asarray(plain["eps"]).ravel())[0, 1]
    assert abs(xi.std() - 1) < 5 / (2 * xi.size) ** 0.5 and abs(correlation) < 5 / xi.size**0.5


def test_classes_are_dropped_at_the_chosen_rate(tiny_config):
    batch = {
        "image": jnp.zeros((2000, 8, 8, 1), jnp.uint8),
        "label": jnp.full((2000,), 4, jnp.int32),
    }
    label = np.asarray(drawn(tiny_config, batch)["label"])
    assert set(label) == {4, 10}
    assert abs((label == 10).mean() - 0.1) < 4 * (0.09 / 2000) ** 0.5


def test_an_unmasked_stage_draws_whole_images(tiny_config):
    tiny_config.mask.kind = "none"
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    batch = {"image": jnp.asarray(image), "label": jnp.zeros((2,), jnp.int32)}
    examples = drawn(tiny_config, batch)
    assert "visible" not in examples and examples["x0"].shape == (2, 16, 4)
    first_patch = image[0, :2, :2, 0].reshape(-1) / 127.5 - 1
    assert_close(examples["x0"][0, 0], first_patch, 1e-6)


def materialize_nan(config, arrays, batch):
    """The first image becomes NaN if its label is 9."""
    bad = (batch["label"] == 9) & (jnp.arange(16) == 0)
    image = batch["image"].astype(jnp.float32)
    return batch | {"image": jnp.where(bad[:, None, None, None], jnp.nan, image)}


@pytest.fixture
def one_update(monkeypatch):
    """(config, devices) -> (an update that is not finite for the label 9, a state after one good
    step, a function that makes batches)."""
    monkeypatch.setattr(batch_lib, "materialize", materialize_nan)

    def made(config, num_devices):
        mesh = mesh_of(config, num_devices)
        phase = phases(config)[0]
        jitted, plan = step.jit_train_step(phase, mesh), step.planned(phase, mesh)

        def update(state, arrays, batch):  # the step donates its state
            return jitted(jax.tree.map(jnp.copy, state), arrays, batch, plan)

        def batch(label):
            image = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
            made = {"image": image, "label": np.full((16,), label, np.int32)}
            return jax.device_put(made, sharding.batch_sharding(mesh))

        return update, update(init_state(config, mesh), {}, batch(1))[0], batch

    return made


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("num_devices, fsdp", [(1, 1), (8, 4)])
def test_an_update_that_is_not_finite_changes_nothing_but_the_step(
    tiny_config, one_update, monkeypatch, num_devices, fsdp
):
    tiny_config.mesh.fsdp = fsdp
    # With a ramp, the EMA is a copy at first. The decay is most of an update, and shows its rate.
    tiny_config.optim.update(ema_ramp=False, warmup_steps=10, lr_peak=1e-6, weight_decay=1e4)
    update, state, batch = one_update(tiny_config, num_devices)
    after, metrics = update(state, {}, batch(9))
    assert not np.isfinite(metrics["loss"]) and float(metrics["skipped"]) == 1
    assert_same_bits(
        (after.params, after.ema, after.opt_state), (state.params, state.ema, state.opt_state)
    )
    assert int(after.step) == int(state.step) + 1 == 2

    again, metrics = update(after, {}, batch(1))
    assert np.isfinite(metrics["loss"]) and float(metrics["skipped"]) == 0
    old, new = (np.asarray(s.params["mid_block"]["qkv"]["kernel"]) for s in (after, again))
    assert float(metrics["lr"]) == pytest.approx(2e-7)  # two of ten steps, one of them skipped
    assert np.median((1 - new / old) / 1e4) == pytest.approx(2e-7, rel=0.05)

    # The check changes a good update by rounding at most: the compiler fuses the update with the
    # choice, and may then skip one rounding.
    checked, _ = update(state, {}, batch(2))
    monkeypatch.setattr(step, "is_finite", lambda loss, norm: jnp.bool_(True))  # compiled away
    update, state, batch = one_update(tiny_config, num_devices)
    unchecked, _ = update(state, {}, batch(2))
    assert_close(checked, unchecked, 1e-6)


def test_muon_and_a_weighted_loss_train_alike_on_8_devices_and_skip_what_is_not_finite(
    tiny_config, one_update
):
    tiny_config.model.depth = 1
    tiny_config.optim.update(name="muon", warmup_steps=0, clip_norm=0.1, decay_on="matrices")
    tiny_config.diffusion.update(
        prediction="v", loss_weight="sigmoid", draw="logit_normal", input_perturbation=0.1
    )
    losses = {}
    for num_devices in (1, 8):
        tiny_config.mesh.fsdp = min(num_devices, 4)
        update, state, batch = one_update(tiny_config, num_devices)
        losses[num_devices] = []
        for label in range(4):
            state, metrics = update(state, {}, batch(label))
            losses[num_devices].append(float(metrics["loss"]))
    assert_close(np.array(losses[8]), np.array(losses[1]), 1e-5)
    after, metrics = update(state, {}, batch(9))
    assert float(metrics["skipped"]) == 1
    assert_same_bits((after.params, after.opt_state), (state.params, state.opt_state))


def test_a_run_of_three_steps_gives_these_numbers(tiny_config):
    # Measured with this test, on a CPU. A change of 1 % in what an update computes changes them.
    tiny_config.data.flip = True
    tiny_config.optim.update(ema_ramp=False, ema_decay=0.5, weight_decay=10.0)
    losses, state = curve(tiny_config, 1, steps=3)
    begun = init_state(tiny_config, mesh_of(tiny_config, 1)).params
    moved = (jax.tree.map(jnp.subtract, tree, begun) for tree in (state.params, state.ema))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    norms = np.array([float(optim.global_norm(tree)) for tree in (*moved, moments)])
    assert_close(losses, PINNED_LOSSES, 1e-5)
    for norm, pinned in zip(norms, PINNED_NORMS, strict=True):
        assert_close(norm, pinned, 1e-4)


def test_a_flip_is_left_right(tiny_config):
    tiny_config.data.flip = True
    tiny_config.mask.kind = "none"
    image = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    batch = {"image": jnp.asarray(image), "label": jnp.zeros((200,), jnp.int32)}
    x0 = drawn(tiny_config, batch)["x0"]
    seen = np.asarray(patches.join(x0, tiny_config.model.patch_size, (8, 8)))
    mirrored = [(a == b[:, ::-1]).all() for a, b in zip(seen, image, strict=True)]
    same = [(a == b).all() for a, b in zip(seen, image, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert abs(sum(mirrored) - 100) < 5 * 50**0.5


@pytest.mark.parametrize("kind", ["none", "patch", "block", "crop"])
def test_a_rectangular_image_goes_through_a_step_and_is_drawn(tiny_config, kind):
    tiny_config.data.image_size = (8, 24)
    tiny_config.mask.update(kind=kind, block_size=2, crop_size=3)
    losses, state = curve(tiny_config, 1, steps=3)
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    tiny_config.sample.steps = 2
    mesh = mesh_of(tiny_config, 1)
    image = draw.jit_draw(tiny_config, mesh, sharding.replicated(mesh))(
        state.ema, np.arange(2, dtype=np.int32)
    )
    assert image.shape == (2, 8, 24, 1) and image.dtype == np.uint8


def test_ids_of_images_on_the_device_give_the_same_update_as_the_images(tiny_config):
    mesh = mesh_of(tiny_config, 8)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    cache = {"image": images, "label": np.arange(40, dtype=np.int32) % 10}
    ids = np.random.default_rng(1).permutation(40)[:16].astype(np.int32)
    by_batch = sharding.batch_sharding(mesh)
    states = []
    for cached in (False, True):
        tiny_config.data.cache = "device" if cached else "host"
        arrays = batch_lib.flat(cache) if cached else {}
        batch = {"ids": ids} if cached else {k: v[ids] for k, v in cache.items()}
        arrays = jax.device_put(arrays, sharding.replicated(mesh))
        phase = phases(tiny_config)[0]
        given = init_state(tiny_config, mesh), arrays, jax.device_put(batch, by_batch)
        # Compiled from shapes alone, as the dry run and the benchmarks do.
        compiled = step.lower_train_step(phase, mesh, 40).compile()
        states.append(compiled(*given, step.planned(phase, mesh))[0])
    # The first learning rate is 0, so the images and labels affect only the moments.
    assert_same_bits(states[0].opt_state, states[1].opt_state)


def test_dropout_is_drawn_anew_for_each_step_and_each_part_of_a_batch(tiny_config):
    tiny_config.data.flip = False
    losses = {}
    for dropout, parts in ((0.0, 1), (0.5, 1), (0.5, 2)):
        tiny_config.model.dropout, tiny_config.optim.accumulate_steps = dropout, parts
        losses[dropout, parts], _ = curve(tiny_config, 1, steps=2)
    again, _ = curve(tiny_config, 1, steps=2)
    np.testing.assert_array_equal(again, losses[0.5, 2])
    # The first two updates have the learning rates 0 and little: the weights are still the same.
    assert (np.abs(losses[0.5, 1] / losses[0.0, 1] - 1) > 1e-5).all()
    assert (np.abs(losses[0.5, 1] / losses[0.5, 2] - 1) > 1e-5).all()


def test_the_step_donates_its_state(tiny_config):
    mesh = mesh_of(tiny_config, 1)
    phase, state = phases(tiny_config)[0], init_state(tiny_config, mesh)
    batch = {
        "image": jnp.zeros((16, 8, 8, 1), jnp.uint8),
        "label": jnp.zeros((16,), jnp.int32),
    }
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    step.jit_train_step(phase, mesh)(state, {}, batch, step.planned(phase, mesh))
    kernel = state.params["mid_block"]["qkv"]["kernel"]
    assert kernel.is_deleted()


@pytest.mark.parametrize("framework, draw", [("ddpm", "draw"), ("edm", "edm")])
def test_runs_that_differ_in_seed_length_rate_and_levels_share_one_program(
    tiny_config, framework, draw
):
    tiny_config.optim.lr_schedule = "wsd"
    tiny_config.diffusion.update(framework=framework, draw="logit_normal")
    mesh = mesh_of(tiny_config, 2)

    def program(seed, first_step, last_step, level_mean, level_std, **fields):
        config = tiny_config.copy_and_resolve_references()
        config.seed = seed
        config.optim.update(fields)
        config.diffusion.update({f"{draw}_mean": level_mean, f"{draw}_std": level_std})
        phase = Phase(1, first_step, last_step, config, 0, first_step)
        return step.lower_train_step(phase, mesh, 40).as_text()

    first = program(0, 0, 10, -1.0, 1.0, lr_peak=1e-3, warmup_steps=2)
    rate = dict(lr_peak=0.02, lr_end=0.1, warmup_steps=50, lr_decay_share=0.6)
    assert first == program(1, 7, 900, 0.5, 1.5, **rate)
    assert first != program(0, 0, 10, -1.0, 1.0, lr_peak=1e-3, warmup_steps=2, weight_decay=0.5)


def test_another_seed_starts_from_other_weights_without_compiling(tiny_config):
    mesh, misses = mesh_of(tiny_config, 1), []
    first = init_state(tiny_config, mesh).params
    tiny_config.seed += 1

    def listen(event, **_):
        misses.extend([event] if event == "/jax/compilation_cache/cache_misses" else [])

    jax.monitoring.register_event_listener(listen)
    try:
        other = init_state(tiny_config, mesh).params
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert not misses
    assert jnp.any(first["position"] != other["position"])
    expected = jax.jit(lambda: fresh_params(tiny_config, mesh))()
    assert jax.tree.all(jax.tree.map(np.array_equal, other, expected))


def test_a_step_that_is_held_is_not_compiled_again(tiny_config):
    mesh, other = mesh_of(tiny_config, 2), tiny_config.copy_and_resolve_references()
    held = step.jit_train_step(phases(tiny_config)[0], mesh)
    other.train.num_steps += 10
    other.seed += 1
    other.optim.update(lr_peak=0.5, lr_end=0.5, warmup_steps=3, lr_decay_share=0.5)
    other.diffusion.update(draw_mean=1.0, draw_std=2.0)
    assert step.jit_train_step(phases(other)[0], mesh) is held
    assert step.jit_train_step(phases(other)[0], mesh_of(other, 1)) is not held
    other.optim.weight_decay += 0.1
    assert step.jit_train_step(phases(other)[0], mesh) is not held
