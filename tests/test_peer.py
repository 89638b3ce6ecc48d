"""The PyTorch peer is the same network as ours; otherwise its speed would mean nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from conftest import NEEDS_TORCH

from configs import pretrain_celeba64
from maskdm_jax.diffusion import ddpm, make_process
from maskdm_jax.model import masking, uvit

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)

from benchmarks import peer_torch  # noqa: E402


@pytest.fixture
def config():
    config = pretrain_celeba64.get_config()
    config.update_from_flattened_dict(
        {"model.width": 64, "model.depth": 5, "model.num_heads": 2, "train.batch_size": 4}
    )
    config.data.image_size = (32, 48)
    config.mask.ratio = 0.5
    config.model.dtype = "float32"
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
        theirs = peer(torch.tensor(x), torch.tensor(t), ids)
    assert_close(theirs.numpy(), ours, 1e-5)


@pytest.mark.parametrize("kind", ["patch", "block"])
def test_the_peer_hides_whole_blocks_and_as_many_as_we_do(config, kind):
    config.mask.kind = kind
    ids = peer_torch.draw_visible_ids(5, config.mask, (8, 12), torch.device("cpu")).numpy()
    assert ids.shape == (5, masking.num_visible(config.mask, (8, 12)))
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
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), np.uint8)
    trained = peer_torch.measure(config, images, seconds=0.1)
    sampled = peer_torch.measure_sampling(config, batch=2, seconds=0.1)
    assert trained["images_per_s"] > 0 and sampled["evaluations_per_s"] > 0
    assert set(trained) - {"images_per_s"} == {"compile_s", "memory_gib", "versions"}


def test_the_peer_names_what_it_does_not_implement(config):
    config.model.num_classes = 10
    with pytest.raises(ValueError, match="model.num_classes"):
        peer_torch.make_model(config)
