"""What a run does if its numbers stay bad or its disk is full."""

import errno
import json
import os
import pathlib
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax import checkpoint, dry_run, flops, train
from maskdm_jax.config import default_config, validate
from maskdm_jax.data import batch as batch_lib
from maskdm_jax.data import loader
from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.run import faults, hashes
from maskdm_jax.run.telemetry import Telemetry, read_metrics
from maskdm_jax.state import TrainState


def run_with_nan_at(monkeypatch, config, workdir, bad_steps):
    """Trains with images that are NaN in the given updates, counted from 1."""
    batches = loader.Loader.batches

    def numbered(self, step):
        for n, batch in enumerate(batches(self, step), step + 1):
            yield batch | {"bad": jnp.asarray(n in bad_steps)}

    clean = batch_lib.materialize

    def materialize(config, arrays, batch):
        examples = clean(config, arrays, batch)
        image = examples["image"].astype(jnp.float32)
        return {**examples, "image": jnp.where(batch["bad"], jnp.nan, image)}

    monkeypatch.setattr(loader.Loader, "batches", numbered)
    monkeypatch.setattr(batch_lib, "materialize", materialize)
    train.train(config, workdir)


def test_skipped_steps_are_counted_and_a_run_continues(tiny_config, tmp_path, monkeypatch, capsys):
    tiny_config.model.depth = 1
    tiny_config.train.num_steps = 8
    tiny_config.train.log_every_steps = 100
    tiny_config.train.max_skipped_steps = 3
    run_with_nan_at(monkeypatch, tiny_config, tmp_path, (3, 4, 6))
    records = {r["step"]: r for r in read_metrics(tmp_path)}
    assert {s: r["skipped"] for s, r in records.items()} == {1: 0, 3: 1, 4: 2, 6: 3, 8: 3}
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[1]
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None  # JSON has no NaN
    assert np.isnan(records[3]["loss"]) and np.isfinite(records[8]["loss"])
    assert "skipped 3" in capsys.readouterr().out
    assert checkpoint.steps(tmp_path) == [8]

    tiny_config.train.num_steps = 10  # a resumed run continues the count
    run_with_nan_at(monkeypatch, tiny_config, tmp_path, (9,))
    assert read_metrics(tmp_path)[-1]["skipped"] == 4


def test_too_many_skipped_steps_in_a_row_stop_the_run(tiny_config, tmp_path, monkeypatch):
    tiny_config.model.depth = 1
    tiny_config.train.num_steps = 50
    tiny_config.checkpoint.every_steps = 2
    tiny_config.train.max_skipped_steps = 3
    with pytest.raises(RunError) as error:
        run_with_nan_at(monkeypatch, tiny_config, tmp_path, range(5, 50))
    text = str(error.value)
    assert "from step 5 to 7, 3 in a row" in text and "lr_peak" in text
    newest = checkpoint.steps(tmp_path)[-1]
    assert f"step {newest} in {tmp_path}/checkpoints" in text
    for leaf in checkpoint.restore_item(tmp_path, newest, "params")["norm"].values():
        assert np.isfinite(leaf).all()


def test_the_number_of_skipped_steps_is_validated(tiny_config):
    tiny_config.train.max_skipped_steps = 0
    with pytest.raises(
        ConfigError, match="train.max_skipped_steps is 0; expected a whole number, at least 1"
    ):
        validate(tiny_config)


def state_of(num_floats):
    params = np.random.default_rng(0).normal(size=num_floats).astype(np.float32)
    return TrainState(step=jnp.int32(0), params={"a": jnp.asarray(params)}, ema={}, opt_state={})


def fill_up(workdir, last_call):
    """Saves step 1, which fits into 1 MB, then 2, which does not; `last_call` raises the error."""
    config = default_config()
    config.checkpoint.every_steps = 1
    checkpoints = checkpoint.Checkpoints(workdir, config)
    checkpoints.save(1, state_of(100_000))
    checkpoints.save(2, state_of(1_000_000))
    with pytest.raises(RunError) as error:
        if last_call == "check":
            while True:
                checkpoints.check()
        if last_call == "save":
            checkpoints.save(3, state_of(100_000))
        checkpoints.close()
    assert checkpoint.find_step(workdir) == 1
    return str(error.value)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("This mounts a small file system, which only root can do.")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("last_call", ["check", "save", "close"])
def test_a_full_disk_is_one_sentence_whichever_call_finds_it(small_disk, last_call):
    text = fill_up(small_disk, last_call)
    assert text.startswith(f"checkpoint 2 could not be written to {small_disk}/checkpoints: No sp")
    assert "about 3.8 MiB are needed" in text and "the same command resumes from step 1" in text


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        text = fill_up(tmp_path, "close")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in text and "resumes from step 1" in text


def test_metrics_on_a_full_disk_are_one_sentence(small_disk):
    (small_disk / "filler").write_bytes(b"0" * (2 * 2**20 - 64 * 2**10))
    telemetry = Telemetry(
        small_disk, default_config(), 0, lambda step: flops.Work(step, step, step), None
    )
    with pytest.raises(RunError, match="the metrics could not be written .* No space left"):
        for step in range(1, 10_000):
            telemetry.log(step, {"loss": 0.5, "lr": 1e-4, "grad_norm": 1.0})
    assert read_metrics(small_disk)[-1]["step"] >= step - 1


def test_a_full_disk_is_told_where_not_even_the_folder_could_be_made(tmp_path):
    with pytest.raises(RunError, match="about 0.0 MiB are needed, and [0-9.,]+ MiB are free"):
        with faults.explain_full_disk("it", tmp_path / "a" / "b", "make room", lambda: 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ValueError, match="^a bug$"):
        with faults.explain_full_disk("it", tmp_path, "wait"):
            raise ValueError("a bug")
    assert not faults.disk_is_full(PermissionError(errno.EACCES, "no"))


def test_an_unexpected_error_is_printed_and_ends_main_with_exit_code_70(tmp_path):
    code = "import runpy; from maskdm_jax import train; train.train = None; "
    code += "runpy.run_path('main.py', run_name='__main__')"
    flags = ["--config=configs/pretrain_digits.py", f"--workdir={tmp_path}"]
    command = [sys.executable, "-c", code, *flags]
    root = pathlib.Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 70
    assert result.stderr.rstrip().endswith("TypeError: 'NoneType' object is not callable")


def test_a_disk_full_for_the_hashes_alone_names_the_checkpoint_before(
    tiny_config, tmp_path, monkeypatch
):
    store = hashes.store

    def store_one(folder):
        if folder.name == "2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return store(folder)

    monkeypatch.setattr(hashes, "store", store_one)
    tiny_config.train.update(num_steps=3, sample_every_steps=0)
    tiny_config.checkpoint.every_steps = 1
    with pytest.raises(RunError, match="checkpoint 2 .* resumes from step 1"):
        train.train(tiny_config, tmp_path)
    assert checkpoint.steps(tmp_path)[-1] == 2 and checkpoint.find_step(tmp_path) == 1


def test_a_full_disk_ends_main_with_exit_code_1(run_main, small_disk):
    flags = ["--config.checkpoint.every_steps=1", "--config.checkpoint.keep_last=50"]
    result = run_main("pretrain_digits", small_disk, *flags)
    assert result.returncode == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if "images in" not in line]
    assert len(errors) == 1 and errors[0].startswith("error: checkpoint"), result.stderr
    assert f"resumes from step {checkpoint.find_step(small_disk)}" in errors[0]


def test_a_dry_run_moves_no_checkpoint_that_a_run_beside_it_is_saving(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(dry_run, "_MAX_BATCH", 16)  # test_memory.py covers the search
    tiny_config.model.depth = 1
    tiny_config.train.num_steps = 4
    tiny_config.checkpoint.every_steps = 2
    train.train(tiny_config, tmp_path)
    (tmp_path / "checkpoints" / "4" / "sha256.json").unlink()  # not written yet
    tiny_config.train.update(num_steps=8, dry_run=True)
    train.train(tiny_config, tmp_path)
    assert checkpoint.steps(tmp_path) == [2, 4]
