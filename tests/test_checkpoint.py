import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax import checkpoint, optim, sharding, uvit
from maskdm_jax.config import ConfigError, default_config
from maskdm_jax.state import create_state


def tiny_state(seed=0):
    config = default_config()
    config.seed = seed
    model = uvit.UViT(num_patches=4, patch_dim=4, width=8, depth=3, num_heads=2)
    return create_state(config, model, optim.make_optimizer(config))


def saved(workdir, steps, seed=0, **fields):
    config = default_config()
    config.checkpoint.update(fields)
    checkpoints = checkpoint.Checkpoints(workdir, config)
    state = tiny_state(seed)
    for step in steps:
        checkpoints.save(step, state.replace(step=jnp.int32(step)), force=step == steps[-1])
    checkpoints.close()
    return state


def test_the_last_ones_and_every_nth_are_kept(tmp_path):
    saved(tmp_path, range(1, 12), every_steps=2, keep_last=2, keep_every_steps=4)
    assert checkpoint.steps(tmp_path) == [4, 8, 10, 11]


def test_a_state_comes_back_as_it_was_on_another_mesh(tmp_path):
    state = saved(tmp_path, [3])
    config = default_config()
    config.mesh.fsdp = 4
    mesh = sharding.make_mesh(config)
    abstract = sharding.abstract(tiny_state, mesh)
    restored = checkpoint.Checkpoints(tmp_path, config).restore(3, abstract)
    assert int(restored.step) == 3
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    assert not restored.params["mid_block"]["qkv"]["kernel"].sharding.is_fully_replicated


def test_digest_compares_states(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        saved(tmp_path / name, [5, 6], seed, every_steps=5)
    a, b, c = (checkpoint.digest(tmp_path / name) for name in "abc")
    assert a == b and a[0] == 6 and a[1] != c[1]
    assert checkpoint.main(["digest", str(tmp_path / "a"), "--step", "5"]) == 0
    assert capsys.readouterr().out == f"step 5 sha256 {a[1]}\n"


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        checkpoint.find_step(tmp_path)
    saved(tmp_path, [5])
    assert checkpoint.main(["digest", str(tmp_path), "--step", "7"]) == 2
    assert "no checkpoint of step 7; it holds [5]" in capsys.readouterr().err


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    saved(tmp_path, [5])
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp-123").mkdir()
    assert checkpoint.find_step(tmp_path) == 5
