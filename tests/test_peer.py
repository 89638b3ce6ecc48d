"""The PyTorch peer is the same network as ours; otherwise its speed would mean nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from conftest import NEEDS_TORCH

from configs import pretrain_celeba64
from maskdm_jax.diffusion import ddpm, make_process
from maskdm_jax.diffusion.objective import denoising_loss
from maskdm_jax.model import masking, patches, uvit
from maskdm_jax.step import draw_examples

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)

from benchmarks import peer_torch  # noqa: E402


@pytest.fixture
def config():
    config = pretrain_celeba64.get_config("paper")
    config.update_from_flattened_dict(
        {"model.width": 64, "model.depth": 5, "model.num_heads": 2, "train.batch_size": 4}
    )
    config.data.image_size = (32, 48)
    config.mask.ratio = 0.5
    config.model.dtype = "float32"
    return config


@pytest.fixture
def pooled_config(config):
    config.data.image_size = (32, 64)
    config.mask.update(hidden="pool", block_size=4, pool_size=4, ratio=0.6)
    return config


def to_torch(params):
    """Our parameter tree as a state_dict of the peer's UViT."""
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *names, field = (entry.key for entry in path)
        if names and names[0].startswith(("in_block_", "out_block_")):
            side, _, index = names[0].rpartition("_")
            names[0] = f"{side}s.{index}"
        field = {"kernel": "weight", "scale": "weight"}.get(field, field)
        value = leaf.T if path[-1].key == "kernel" else leaf
        state[".".join([*names, field])] = torch.tensor(np.asarray(value))
    return state


def both_models(config):
    model = uvit.make_model(config)
    params = uvit.init_params(model, jax.random.key(0))
    # Away from the zeros and ones of fresh biases and scales.
    leaves, treedef = jax.tree.flatten(params)
    generator = np.random.default_rng(0)
    leaves = [x + 0.05 * generator.normal(size=x.shape).astype(np.float32) for x in leaves]
    params = jax.tree.unflatten(treedef, leaves)
    peer = peer_torch.make_model(config)
    peer.load_state_dict(to_torch(params))
    return model, params, peer


@pytest.mark.parametrize("masked", [True, False])
def test_the_peer_gives_our_output_for_our_weights(config, masked):
    model, params, peer = both_models(config)
    grid = (8, 12)
    visible = masking.draw_visible_ids(jax.random.key(1), 3, config.mask, grid) if masked else None
    count = masking.num_visible(config.mask, grid) if masked else 96
    x = np.random.default_rng(1).normal(size=(3, count, 48)).astype(np.float32)
    t = np.array([0, 3, 999])
    ours = uvit.apply(model, params, jnp.asarray(x), jnp.asarray(t), visible_BV=visible)
    ids = None if visible is None else torch.tensor(np.asarray(visible)).long()
    with torch.no_grad():
        theirs, pooled = peer(torch.tensor(x), torch.tensor(t), ids)
    assert_close(theirs.numpy(), ours, 1e-5)
    assert pooled is None


def some_images(num, size):
    return np.random.default_rng(2).integers(0, 256, (num, *size, 3), np.uint8)


def our_loss_and_gradient(config, model, params, examples):
    process = make_process(config.diffusion, config.data.image_size)
    pooled_BG = examples.get("pooled")
    ids = {"visible_BV": examples["visible"], "pooled_BG": pooled_BG}

    def loss(params):
        losses = denoising_loss(
            lambda x_BVP, t_B: uvit.apply(model, params, x_BVP, t_B, **ids),
            process,
            examples["x0"],
            examples["eps"],
            examples["t"],
            config.diffusion.loss,
            num_pooled=0 if pooled_BG is None else pooled_BG.shape[1],
            pool_weight=config.mask.pool_weight,
        )
        return jnp.mean(losses)

    return jax.value_and_grad(loss)(params)


def for_the_peer(examples):
    """Our examples, in which pooled tokens follow the patches, as the peer's."""
    given = {name: torch.tensor(np.asarray(array)) for name, array in examples.items()}
    given["visible"] = given["visible"].long()
    if "pooled" in given:
        given["pooled"] = given["pooled"].long()
        count = given["visible"].shape[1]
        for name in ("x0", "eps"):
            given[f"{name}_pooled"] = given[name][:, count:]
            given[name] = given[name][:, :count]
    return given


@pytest.mark.parametrize("loss, prediction", [("l2", "eps"), ("l1", "v")])
@pytest.mark.parametrize("hidden", ["drop", "pool"])
def test_the_peer_gives_our_loss_and_gradients_for_our_draws(
    pooled_config, hidden, loss, prediction
):
    config = pooled_config
    config.mask.hidden = hidden
    config.diffusion.update(loss=loss, prediction=prediction)
    model, params, peer = both_models(config)
    process = make_process(config.diffusion, config.data.image_size)
    batch = {"image": jnp.asarray(some_images(4, (32, 64)))}
    examples = draw_examples(config, process, batch, config.seed, jnp.int32(0))
    assert ("pooled" in examples) == (hidden == "pool")
    ours, gradient = our_loss_and_gradient(config, model, params, examples)
    theirs = peer_torch.make_loss(config, peer, torch.device("cpu"), False)(for_the_peer(examples))
    theirs.backward()
    assert_close(theirs.item(), ours, 1e-4)
    expected, named = to_torch(gradient), dict(peer.named_parameters())
    assert expected.keys() == named.keys()
    for name, parameter in named.items():
        assert_close(parameter.grad.numpy(), expected[name].numpy(), 1e-4)


def test_the_peer_pools_the_hidden_blocks_and_draws_the_noise_of_averages(pooled_config):
    config, grid = pooled_config, (8, 16)
    config.mask.pool_size = 2  # four tokens of each block
    image = some_images(256, (32, 64))
    drawn = peer_torch.make_draw(config, torch.device("cpu"))(torch.tensor(image))
    assert drawn["pooled"].shape == (256, masking.num_pooled(config.mask, grid))
    squares = np.zeros((256, 4, 8), int)
    np.put_along_axis(squares.reshape(256, -1), drawn["pooled"].numpy(), 1, axis=1)
    patch = np.zeros((256, 8, 16), int)
    np.put_along_axis(patch.reshape(256, -1), drawn["visible"].numpy(), 1, axis=1)
    # Each patch is visible, or in one of the pooled squares.
    np.testing.assert_array_equal(squares.repeat(2, 1).repeat(2, 2), 1 - patch)
    expected = patches.pool(jnp.asarray(image), 4, 2, jnp.asarray(drawn["pooled"].numpy()))
    assert_close(drawn["x0_pooled"].numpy(), expected, 1e-5)
    expected = patches.cut(jnp.asarray(image), 4, jnp.asarray(drawn["visible"].numpy()))
    assert_close(drawn["x0"].numpy(), expected, 1e-5)
    assert drawn["eps"].std().item() == pytest.approx(1, rel=0.01)
    assert drawn["eps_pooled"].std().item() == pytest.approx(1 / 2, rel=0.01)


@pytest.mark.parametrize("kind", ["patch", "block"])
def test_the_peer_hides_whole_blocks_and_as_many_as_we_do(config, kind):
    config.mask.kind = kind
    ids, pooled = peer_torch.draw_ids(5, config.mask, (8, 12), torch.device("cpu"))
    ids = ids.numpy()
    assert pooled is None and ids.shape == (5, masking.num_visible(config.mask, (8, 12)))
    for row in ids:
        seen = np.zeros(96, int)
        np.add.at(seen, row, 1)
        assert seen.max() == 1
        if kind == "block":
            blocks = seen.reshape(4, 2, 6, 2).sum((1, 3))
            assert set(blocks.ravel()) <= {0, 4}
    assert not np.array_equal(np.sort(ids[0]), np.sort(ids[1]))


def test_the_peers_ddim_step_has_our_coefficients(config):
    config.sample.steps = 10
    table = peer_torch.ddim_table(config)
    levels = make_process(config.diffusion, (32, 48)).ladder(10, "timestep")
    np.testing.assert_array_equal(table[:, 0], levels.time)
    assert table.shape == (10, 8) and np.isfinite(table).all()
    x0, eps = np.random.default_rng(0).normal(size=(2, 10))
    x_t = levels.signal * x0 + levels.noise * eps  # and eps is the output
    assert_close(table[:, 1] * x_t + table[:, 2] * eps, x0, 1e-2)
    assert_close(table[:, 3] * x_t + table[:, 4] * eps, eps, 1e-5)
    # Song et al. 2021, equation 12, at eta 1, from the schedule itself.
    abar = ddpm.make_alphas_cumprod(config.diffusion, (32, 48))
    now, then = abar[levels.time], np.append(abar[levels.time[1:]], 1.0)
    variance = (1 - now / then) * (1 - then) / (1 - now)
    expected = np.sqrt([then, np.maximum(1 - then - variance, 0), variance])
    assert_close(table[:, 5:].T, expected, 1e-5)


def test_the_peer_measures_training_and_sampling_on_any_machine(config):
    trained = peer_torch.measure(config, some_images(8, (32, 48)), seconds=0.1)
    sampled = peer_torch.measure_sampling(config, batch=2, seconds=0.1)
    assert trained["images_per_s"] > 0 and sampled["evaluations_per_s"] > 0
    assert set(trained) - {"images_per_s"} == {"compile_s", "memory_gib", "versions"}


def test_the_peer_measures_training_with_pooled_tokens(pooled_config):
    trained = peer_torch.measure(pooled_config, some_images(8, (32, 64)), seconds=0.1)
    assert trained["images_per_s"] > 0


def test_the_peer_names_what_it_does_not_implement(config):
    config.model.num_classes = 10
    with pytest.raises(ValueError, match="model.num_classes"):
        peer_torch.make_model(config)
