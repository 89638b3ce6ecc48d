import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax import checkpoint, sharding
from maskdm_jax.config import default_config
from maskdm_jax.errors import ConfigError
from maskdm_jax.state import init_state


def tiny_state(seed=0):
    config = default_config()
    config.seed = seed
    config.data.update(image_size=(4, 4), channels=1)
    config.model.update(width=8, depth=3, num_heads=2, patch_size=2)
    return init_state(config, sharding.make_mesh(config, jax.devices()[:1]))


def saved(workdir, steps, seed=0, **fields):
    config = default_config()
    config.checkpoint.update(fields)
    checkpoints = checkpoint.Checkpoints(workdir, config)
    state = tiny_state(seed)
    for step in steps:
        checkpoints.save(step, state.replace(step=jnp.int32(step)), force=step == steps[-1])
    checkpoints.close()
    return state


def test_the_last_checkpoints_and_every_nth_are_kept(tmp_path):
    saved(tmp_path, range(1, 12), every_steps=2, keep_last=2, keep_every_steps=4)
    assert checkpoint.steps(tmp_path) == [4, 8, 10, 11]


def test_a_state_is_restored_unchanged_on_another_mesh(tmp_path):
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


def test_digests_are_equal_for_equal_states_only(tmp_path, capsys):
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


def test_a_checkpoint_that_only_process_0_sees_is_an_error(tmp_path, monkeypatch):
    saved(tmp_path, [5])
    monkeypatch.setattr(checkpoint.distributed, "is_main", lambda: False)
    monkeypatch.setattr(checkpoint.distributed, "agreed", lambda numbers: [6])
    with pytest.raises(ConfigError, match="has no checkpoint 6, which process 0 has there"):
        checkpoint.find_step(tmp_path)


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    saved(tmp_path, [5])
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp-123").mkdir()
    assert checkpoint.find_step(tmp_path) == 5


def files(workdir, step):
    """The files that a restore reads: the config's, and the arrays' after their merge."""
    folder = workdir / "checkpoints" / str(step)
    data = sorted((folder / "state" / "d").iterdir())
    return [
        folder / "config" / "metadata",
        folder / "state" / "_METADATA",
        folder / "state" / "manifest.ocdbt",
        *data,
    ]


HARM = {
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    saved(folder, [5, 6], every_steps=1)
    return folder


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("file", range(4), ids=["config", "arrays", "manifest", "data"])
def test_a_damaged_checkpoint_is_reported_and_skipped(
    two_checkpoints, tmp_path, capsys, file, harm
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    HARM[harm](files(run, 6)[file])
    assert checkpoint.find_step(run) == 5
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"checkpoint 6 of {run} is damaged (")
    assert checkpoint.steps(run) == [5, 6]  # a reader moves nothing
    with pytest.raises(ConfigError, match=r"checkpoint 6 .* damaged; others there: \[5\]"):
        checkpoint.find_step(run, 6)

    assert checkpoint.find_step(run, set_aside=True) == 5
    assert checkpoint.steps(run) == [5]
    assert f"moved to {run}/damaged_checkpoints/6" in capsys.readouterr().err
    saved(run, [6])  # and the step can be saved again
    assert checkpoint.find_step(run) == 6
    HARM[harm](files(run, 6)[file])
    assert checkpoint.find_step(run, set_aside=True) == 5
    assert sorted(p.name for p in (run / "damaged_checkpoints").iterdir()) == ["6", "6.2"]


@pytest.mark.parametrize("part", ["state", "config", "state/d"])
def test_a_checkpoint_without_a_part_is_damaged(two_checkpoints, tmp_path, part):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6" / part)
    assert checkpoint.find_step(run) == 5


def test_files_that_a_restore_does_not_need_may_be_missing(two_checkpoints, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    needed = files(run, 6)
    for path in (run / "checkpoints" / "6").rglob("*"):
        if path.is_file() and path not in needed:
            path.unlink()
    assert checkpoint.find_step(run, 6) == 6
    config = default_config()
    mesh = sharding.make_mesh(config)
    restored = checkpoint.Checkpoints(run, config).restore(6, sharding.abstract(tiny_state, mesh))
    assert int(restored.step) == 6


def test_only_damaged_checkpoints_are_an_error_and_stay_in_place(two_checkpoints, tmp_path, capsys):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    for step in (5, 6):
        files(run, step)[3].unlink()
    with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged: \[5, 6\]"):
        checkpoint.find_step(run, set_aside=True)
    assert checkpoint.steps(run) == [5, 6]
    assert checkpoint.main(["digest", str(run)]) == 2
    assert "every checkpoint" in capsys.readouterr().err


def test_digest_takes_the_checkpoint_before_a_damaged_one(two_checkpoints, tmp_path, capsys):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    files(run, 6)[3].unlink()
    assert checkpoint.main(["digest", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("step 5 sha256") and "checkpoint 6" in err
    assert checkpoint.main(["digest", str(run), "--step", "6"]) == 2
