import functools
import json
import os
import pathlib
import shutil
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax import checkpoint, sharding
from maskdm_jax.config import default_config
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import handlers
from maskdm_jax.state import init_state


def tiny_state(seed=0, optimizer="adamw"):
    config = default_config()
    config.seed = seed
    config.optim.name = optimizer
    config.data.update(image_size=(4, 4), channels=1)
    config.model.update(width=8, depth=3, num_heads=2, patch_size=2)
    return init_state(config, sharding.make_mesh(config, jax.devices()[:1]))


made = functools.cache(tiny_state)


def saved(workdir, steps, seed=0, **fields):
    config = default_config()
    config.checkpoint.update(fields)
    checkpoints = checkpoint.Checkpoints(workdir, config)
    state = made(seed)
    for step in steps:
        checkpoints.save(step, state.replace(step=jnp.int32(step)), force=step == steps[-1])
    checkpoints.close()
    return state


def test_the_last_checkpoints_and_every_nth_are_kept(tmp_path):
    saved(tmp_path, range(1, 12), every_steps=2, keep_last=2, keep_every_steps=4)
    assert checkpoint.steps(tmp_path) == [4, 8, 10, 11]
    saved(tmp_path / "first", [1, 2], every_steps=3)  # the first of a run only when it is due
    assert checkpoint.steps(tmp_path / "first") == [2]


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


def test_one_process_saves_one_devices_copy_of_each_array_whole(tmp_path):
    config = default_config()
    copies = jax.NamedSharding(sharding.make_mesh(config), jax.P())
    state = jax.device_put(made(), copies)
    assert len(state.params["mid_block"]["qkv"]["kernel"].addressable_shards) == 8
    checkpoints = checkpoint.Checkpoints(tmp_path, config)
    checkpoints.save(0, state, force=True)
    checkpoints.close()
    with handlers.reader(alone=False) as checkpointer:
        saved = checkpointer.metadata(tmp_path / "checkpoints" / "0").item_metadata.state
    for array in jax.tree.leaves(saved.tree):
        assert array.storage.chunk_shape == array.shape  # with a part from each device, a part


def test_muons_momentum_is_restored_split_over_other_devices(tmp_path):
    config = default_config()
    config.mesh.fsdp = 4
    state = tiny_state(optimizer="muon")
    state = state.replace(opt_state=jax.tree.map(lambda x: x + 3, state.opt_state))
    checkpoints = checkpoint.Checkpoints(tmp_path, config)
    checkpoints.save(3, state.replace(step=jnp.int32(3)), force=True)
    checkpoints.close()
    abstract = sharding.abstract(lambda: tiny_state(optimizer="muon"), sharding.make_mesh(config))
    restored = checkpoint.Checkpoints(tmp_path, config).restore(3, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    momentum = restored.opt_state[1][0].inner_states["muon"].inner_state.mu
    kernel = momentum["mid_block"]["qkv"]["kernel"]
    assert kernel.shape == (8, 3, 8) and kernel.addressable_data(0).shape == (8, 3, 2)


def test_digests_are_equal_for_equal_states_only(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        saved(tmp_path / name, [5, 6], seed, every_steps=5)
    a, b, c = (checkpoint.digest(tmp_path / name) for name in "abc")
    assert a == b and a[0] == 6 and a[1] != c[1]
    assert checkpoint.main(["digest", str(tmp_path / "a"), "--step", "5"]) == 0
    assert capsys.readouterr().out == f"step 5 sha256 {a[1]}\n"


def test_every_printable_character_is_saved_under_or_refused_before_any_write(tmp_path):
    allowed = "".join(set(string.printable) - set("/*?[]\\")) + "ü漢 ~"
    saved(tmp_path / allowed, [5])
    assert checkpoint.find_step(tmp_path / allowed) == 5
    assert checkpoint.load_config(tmp_path / allowed, 5).seed == 0
    for character in "*?[]\\":
        with pytest.raises(ConfigError, match="type a --workdir without them"):
            saved(tmp_path / f"a{character}b", [5])
    assert [path.name for path in tmp_path.iterdir()] == [allowed]


@pytest.mark.parametrize(
    "url", ["s3://bucket/run", "az://bucket/run", "file:///tmp/run", "gs:/run"]
)
def test_a_url_is_refused_and_makes_no_folder(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="expected a path of a local or mounted file system"):
        checkpoint.steps(url)
    with pytest.raises(ConfigError, match="--workdir is"):
        checkpoint.steps(pathlib.Path(url))  # of which pathlib leaves one slash
    assert not list(tmp_path.iterdir())


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        checkpoint.find_step(tmp_path)
    saved(tmp_path, [5])
    assert checkpoint.main(["digest", str(tmp_path), "--step", "7"]) == 2
    assert "holds steps [5], not 7; type --step=5" in capsys.readouterr().err


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
    with pytest.raises(ConfigError, match=r"checkpoint 6 .* damaged; type --step=5"):
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


def all_files(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_no_damage_to_any_file_is_used_in_silence(two_checkpoints, tmp_path, capsys):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    generator = np.random.default_rng(0)
    harms = HARM | {
        "one bit": lambda path: flip(path, int(generator.integers(8 * path.stat().st_size))),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    }
    paths = all_files(run, 6)
    assert len(paths) > 10 and any(path.name == "sha256.json" for path in paths)
    for path in paths:
        kept = path.read_bytes()
        for harm, do in harms.items():
            do(path)
            assert checkpoint.find_step(run) == 5, (path, harm)
            assert f"checkpoint 6 of {run} is " in capsys.readouterr().err
            path.write_bytes(kept)
    assert checkpoint.find_step(run) == 6


def test_none_of_200_flipped_bits_is_used_in_silence(two_checkpoints, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    generator = np.random.default_rng(1)
    paths = all_files(run, 6)
    for _ in range(200):
        path = paths[generator.integers(len(paths))]
        bit = int(generator.integers(8 * path.stat().st_size))
        flip(path, bit)
        assert checkpoint.find_step(run) == 5, (path, bit)
        flip(path, bit)
    assert checkpoint.find_step(run) == 6


def test_a_checkpoint_whose_hashes_were_not_written_is_unfinished(
    two_checkpoints, tmp_path, capsys
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    (run / "checkpoints" / "6" / "sha256.json").unlink()
    assert checkpoint.find_step(run) == 5
    assert f"checkpoint 6 of {run} is not finished (" in capsys.readouterr().err


def test_the_only_checkpoint_resumes_if_its_hashes_were_not_written(
    two_checkpoints, tmp_path, capsys
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "5")
    (run / "checkpoints" / "6" / "sha256.json").unlink()
    assert checkpoint.find_step(run) == 6
    assert "not finished (sha256.json is missing); its arrays can be" in capsys.readouterr().err
    assert checkpoint.find_step(run, set_aside=True) == 6
    capsys.readouterr()
    assert checkpoint.find_step(run) == 6 and not capsys.readouterr().err  # it has them now
    (run / "checkpoints" / "6" / "sha256.json").unlink()
    files(run, 6)[3].unlink()
    with pytest.raises(ConfigError, match="every checkpoint in .* is damaged: .6.;"):
        checkpoint.find_step(run)


def test_a_checkpoint_of_an_earlier_version_loads_and_is_remarked(
    two_checkpoints, tmp_path, capsys
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    folder = run / "checkpoints" / "6"
    (folder / "sha256.json").unlink()
    stored = json.loads((folder / "config" / "metadata").read_text())
    (folder / "config" / "metadata").write_text(json.dumps(stored["config"]))
    assert checkpoint.find_step(run) == 6
    assert "was saved without hashes by an earlier version" in capsys.readouterr().err
    assert checkpoint.load_config(run, 6).to_dict() == checkpoint.load_config(run, 5).to_dict()
    files(run, 6)[3].unlink()  # its arrays are still read in full
    assert checkpoint.find_step(run) == 5


def test_a_checkpoint_that_a_run_retires_meanwhile_is_not_called_damaged(
    two_checkpoints, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    compare = checkpoint.hashes.compare

    def retired(folder):
        if folder.name == "6":
            shutil.rmtree(folder)
        compare(folder)

    monkeypatch.setattr(checkpoint.hashes, "compare", retired)
    assert checkpoint.find_step(run) == 5
    assert capsys.readouterr().err == ""


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
