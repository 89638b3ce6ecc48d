"""Signals and kills, sent to main.py in processes of its own."""

import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from maskdm_jax import checkpoint, train
from maskdm_jax.run import hashes, preemption
from maskdm_jax.run.command_line import TRY_AGAIN
from maskdm_jax.run.telemetry import read_metrics

SMALL = "--config.model.depth=1"  # the number of layers does not matter here
STEPS = ["--config.train.num_steps=400", "--config.train.log_every_steps=1"]
FLAGS = [SMALL, *STEPS, "--config.checkpoint.every_steps=100000"]


def wait_for(process, happened, seconds=120):
    """Polls until `happened()`, while the process lives; returns its result."""
    deadline = time.time() + seconds
    while not (result := happened()):
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.005)
    return result


def send_in_mid_run(process, happened, *signals):
    """Sends the signals once `happened()`; returns (exit code, stdout, stderr)."""
    try:
        wait_for(process, happened)
        for number in signals:
            process.send_signal(number)  # which does nothing once the process has ended
            time.sleep(0.01)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def complaints(err):
    """Lines on standard error other than the progress of decoding."""
    return [line for line in err.splitlines() if "images in" not in line]


def newest(workdir):
    """The newest step whose save is finished: its hashes come last."""
    folder = checkpoint.directory(workdir)
    finished = [step for step in checkpoint.steps(workdir) if hashes.exist(folder / str(step))]
    return max(finished, default=0)


def terminated(run_main, workdir, num_signals):
    """The step at which a run of 400 steps saved and ended after `num_signals` SIGTERMs."""
    process = run_main("pretrain_digits", workdir, *FLAGS, wait=False)
    under_way = lambda: len(read_metrics(workdir)) >= 20  # noqa: E731
    code, out, err = send_in_mid_run(process, under_way, *[signal.SIGTERM] * num_signals)
    assert code == TRY_AGAIN == 75, err
    stopped = int(re.search(r"asked to stop at step (\d+) of 400", out)[1])
    assert checkpoint.steps(workdir) == [checkpoint.find_step(workdir)] == [stopped]
    assert read_metrics(workdir)[-1]["step"] == stopped
    assert not complaints(err)
    return stopped


def test_sigterm_saves_that_very_step(run_main, tmp_path):
    assert terminated(run_main, tmp_path, 1) < 400


def test_a_run_that_gets_sigterms_to_its_end_resumes_like_an_undisturbed_one(run_main, tmp_path):
    calm, stopped_early = tmp_path / "calm", tmp_path / "stopped"
    assert run_main("pretrain_digits", calm, *FLAGS).returncode == 0
    stopped = terminated(run_main, stopped_early, 300)
    result = run_main("pretrain_digits", stopped_early, *FLAGS)
    assert result.returncode == 0, result.stderr
    assert f"resuming from step {stopped}" in result.stdout
    assert checkpoint.digest(stopped_early) == checkpoint.digest(calm)


def test_ctrl_c_is_one_line_and_exit_code_130(run_main, tmp_path):
    flags = [SMALL, "--config.train.num_steps=100000", "--config.checkpoint.every_steps=15"]
    process = run_main("pretrain_digits", tmp_path, *flags, wait=False)
    has_saved = lambda: checkpoint.steps(tmp_path)  # noqa: E731
    code, out, err = send_in_mid_run(process, has_saved, signal.SIGINT, signal.SIGINT)
    assert code == 130 and not complaints(err), err
    newest = checkpoint.steps(tmp_path)[-1]
    told = re.search(r"^stopped at step (\d+); the newest checkpoint is step (\d+);", out, re.M)
    assert int(told[1]) >= int(told[2]) == newest


def test_ctrl_c_among_the_first_imports_is_one_line_and_exit_code_130(run_main, tmp_path):
    process = run_main("pretrain_digits", tmp_path, wait=False)
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    imports_jax = lambda: "jaxlib" in maps.read_text()  # noqa: E731
    code, out, err = send_in_mid_run(process, imports_jax, signal.SIGINT)
    assert (code, err) == (130, "stopped; the same command resumes\n"), out


def test_ctrl_c_among_the_imports_of_another_program_is_one_line(tmp_path):
    command = [sys.executable, "-m", "maskdm_jax.checkpoint", "digest", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    imports_numpy = lambda: "_multiarray" in maps.read_text()  # noqa: E731
    assert send_in_mid_run(process, imports_numpy, signal.SIGINT) == (130, "", "stopped\n")


def test_sigterm_before_the_first_step_asks_for_another_start(run_main, tmp_path):
    process = run_main("pretrain_digits", tmp_path, wait=False)
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    imports_jax = lambda: "jaxlib" in maps.read_text()  # noqa: E731
    code, out, err = send_in_mid_run(process, imports_jax, signal.SIGTERM)
    assert (code, err) == (TRY_AGAIN, "stopped; the same command resumes\n"), out


def test_sigterm_while_sampling_keeps_the_images_and_asks_for_another_start(
    run_main, trained, tmp_path
):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    flags = ["--mode=sample", "--config.sample.steps=20", "--config.sample.batch_size=1"]
    process = run_main("pretrain_digits", workdir, *flags, "--config.sample.num=500", wait=False)
    images = lambda: sorted(workdir.glob("samples/*/0*.png"))  # noqa: E731
    code, out, err = send_in_mid_run(process, lambda: len(images()) > 3, signal.SIGTERM)
    assert code == TRY_AGAIN and "stopped; the same command resumes" in err
    before = {path: path.stat().st_mtime_ns for path in images()}
    result = run_main("pretrain_digits", workdir, *flags, f"--config.sample.num={len(before) + 2}")
    assert result.returncode == 0 and f"{len(before)} of {len(before) + 2} images" in result.stdout
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_run_that_must_stop_saves_once_and_resumes(tiny_config, tmp_path):
    tiny_config.model.depth = 1
    tiny_config.train.num_steps = 6
    tiny_config.train.sample_every_steps = 0
    with pytest.raises(preemption.Preempted, match="at step 4 of 6; the newest checkpoint is 4"):
        train.train(tiny_config, tmp_path, lambda step: step == 4)
    # Stopped again before any step: there is nothing new to save.
    with pytest.raises(preemption.Preempted, match="at step 4 of 6; the newest checkpoint is 4"):
        train.train(tiny_config, tmp_path, lambda step: True)
    with pytest.raises(preemption.Preempted, match="the newest checkpoint is none"):
        train.train(tiny_config, tmp_path / "other", lambda step: True)
    train.train(tiny_config, tmp_path, lambda step: step == 6)  # the last step: finished
    assert checkpoint.steps(tmp_path) == [4, 6]


@pytest.mark.slow
def test_thirty_kills_at_random_moments_lose_nothing(run_main, tmp_path):
    """A third of the kills wait until a save is half-written, a third come soon after a save, and a
    third at any moment from the process's start on: imports, restore, compilation, training."""
    flags = ["--config.train.num_steps=60000", "--config.train.log_every_steps=10"]
    flags += ["--config.checkpoint.every_steps=10", "--config.data.num_threads=1"]
    generator = random.Random(0)
    workdir, folder = tmp_path / "killed", tmp_path / "killed" / "checkpoints"
    before = 0
    in_saves = 0
    for kill in range(30):
        process = run_main("pretrain_digits", workdir, *flags, wait=False)
        try:
            if kill % 3 == 2:
                time.sleep(generator.uniform(0, 10))
            else:
                wait_for(process, lambda old=before: newest(workdir) > old)
            if kill % 3 == 1:
                time.sleep(generator.uniform(0, 0.5))
            elif kill % 3 == 0:
                wait_for(process, lambda: list(folder.glob("*.orbax-checkpoint-tmp*")))
        finally:
            process.kill()
            out, _ = process.communicate()
        went_on = re.search(r"resuming from step (\d+)", out)
        assert went_on is None or int(went_on[1]) == before
        half_written = [p.name for p in folder.glob("*.orbax-checkpoint-tmp*")]
        in_saves += bool(half_written)
        assert newest(workdir) >= before
        before = newest(workdir)
        print(f"kill {kill + 1}: newest checkpoint {before}, half-written {half_written}")
    assert in_saves >= 5

    # Both runs, the killed and the undisturbed, end soon after the last checkpoint.
    num_steps = f"--config.train.num_steps={before + 50}"
    assert run_main("pretrain_digits", workdir, *flags, num_steps).returncode == 0
    rare = "--config.checkpoint.every_steps=1000000"
    assert run_main("pretrain_digits", tmp_path / "calm", *flags, num_steps, rare).returncode == 0
    calm, killed = checkpoint.digest(tmp_path / "calm"), checkpoint.digest(workdir)
    print(f"killed {killed}, undisturbed {calm}; {in_saves} of 30 kills left a half-written save")
    assert killed == calm
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(w)] for w in (workdir, tmp_path / "calm")
    ]
    assert losses[0] == losses[1]
