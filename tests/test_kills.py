"""kill -9 at random moments of preparing, sampling and a first start: the next start comes back."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from maskdm_jax import checkpoint, images
from maskdm_jax.config import default_config
from maskdm_jax.data import sources

pytestmark = pytest.mark.slow
NUM_KILLS = 10


def killed_at_random(start, seconds, seed):
    """Kills the processes that `start()` starts, each after at most `seconds`; returns how many
    were still alive then."""
    generator, alive = random.Random(seed), 0
    for _ in range(NUM_KILLS):
        alive += kill(start(), generator.uniform(0.1, 1) * seconds)
    return alive


def kill(process, seconds):
    """Kills a process and its children after that time; returns whether it was still alive."""
    time.sleep(seconds)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


def seconds_of(start):
    """How long an undisturbed process takes."""
    before, process = time.monotonic(), start()
    _, err = process.communicate()
    assert process.returncode == 0, err
    return time.monotonic() - before


def popen(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def files_below(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_kills_of_prepare(tmp_path):
    (tmp_path / "in").mkdir()
    generator = np.random.default_rng(0)
    for i in range(4000):
        path = tmp_path / "in" / f"{i}.bmp"
        if i < 40:
            Image.fromarray(generator.integers(0, 256, (300, 300, 3), np.uint8)).save(path)
        else:
            os.link(tmp_path / "in" / f"{i % 40}.bmp", path)

    def start(data_dir):
        flags = ["--images", tmp_path / "in", "--name", "many", "--size", "32"]
        flags += ["--data_dir", tmp_path / data_dir, "--num_processes", "2"]
        return popen("-m", "maskdm_jax.data.prepare", *map(str, flags))

    seconds = seconds_of(lambda: start("calm"))
    alive = killed_at_random(lambda: start("killed"), 0.9 * seconds, seed=1)
    left = sorted(p.name for p in (tmp_path / "killed").glob("many/*"))
    print(f"prepare: {alive} of {NUM_KILLS} killed within {seconds:.1f} s, which left {left}")
    assert alive >= NUM_KILLS // 2
    if not (tmp_path / "killed" / "many" / "1.0.0").exists():
        assert start("killed").wait() == 0
    assert [p.name for p in (tmp_path / "killed" / "many").iterdir()] == ["1.0.0"]
    config = default_config()
    config.data.name, config.data.image_size = "many", (32, 32)
    opened = []
    for config.data.dir in (str(tmp_path / "calm"), str(tmp_path / "killed")):
        opened.append(sources.open_source(config))
    assert len(opened[0]) == len(opened[1]) == 4000
    for i in range(0, 4000, 13):
        np.testing.assert_array_equal(opened[0][i]["image"], opened[1][i]["image"])


def test_kills_of_sampling(run_main, tmp_path):
    workdir = tmp_path / "killed"
    assert run_main("pretrain_digits", workdir, "--config.train.num_steps=2").returncode == 0
    shutil.copytree(workdir, tmp_path / "calm")
    flags = ["--mode=sample", "--config.sample.num=12000", "--config.sample.steps=8"]
    flags += ["--config.sample.batch_size=4"]

    def start(folder):
        return run_main("pretrain_digits", folder, *flags, wait=False, own_group=True)

    seconds = seconds_of(lambda: start(tmp_path / "calm"))
    alive = killed_at_random(lambda: start(workdir), 0.4 * seconds, seed=2)
    (calm,) = (tmp_path / "calm" / "samples").iterdir()
    (killed,) = (workdir / "samples").iterdir()
    half = [name for name in files_below(killed) if ".png." in name]
    done = len(list(killed.glob("0*.png")))
    print(f"sample: {alive} of {NUM_KILLS} killed within {seconds:.1f} s; {done} images, {half}")
    assert alive >= NUM_KILLS // 2
    assert start(workdir).wait() == 0
    assert files_below(killed) == files_below(calm)
    for path in calm.glob("0*.png"):
        ours, theirs = images.read_png(killed / path.name, 1), images.read_png(path, 1)
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_kills_of_a_first_start(run_main, tmp_path):
    """The first use of the digits, decoding, the first steps and the first checkpoint."""
    flags = ["--config.train.num_steps=1500", "--config.checkpoint.every_steps=200"]
    flags += ["--config.data.cache=host", "--config.train.log_every_steps=20"]

    def start(name):
        data_dir = f"--config.data.dir={tmp_path / name / 'data'}"
        workdir = tmp_path / name / "run"
        return run_main("pretrain_digits", workdir, *flags, data_dir, wait=False, own_group=True)

    seconds = seconds_of(lambda: start("calm"))
    alive = 0
    for seed in range(NUM_KILLS):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        alive += kill(start("killed"), random.Random(seed).uniform(0.15, 0.95) * seconds)
        process = start("killed")
        out, err = process.communicate()
        assert process.returncode == 0, err
        resumed = re.search(r"resuming from step \d+", out)
        print(f"first start, kill {seed + 1}: {resumed[0] if resumed else 'started again'}")
        ours = checkpoint.digest(tmp_path / "killed" / "run")
        assert ours == checkpoint.digest(tmp_path / "calm" / "run")
        assert not [name for name in files_below(tmp_path / "killed" / "data") if "npy." in name]
    assert alive >= NUM_KILLS // 2
