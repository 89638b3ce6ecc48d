"""What a person sees: bars on terminals of any size, lines elsewhere, progress inside a batch."""

import fcntl
import importlib.util
import os
import pathlib
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections import namedtuple

import jax
import numpy as np
import pytest
import textbook
from conftest import ROOT

from maskdm_jax import config_file, draw, draw_batches, sharding, start_summary, state, train
from maskdm_jax.diffusion import samplers
from maskdm_jax.run import console, distributed, memory, progress

NOTES = ["0:12:34 left", "loss 0.2345", "1,234 images/s", "MFU 41.2%", "lr 2.00e-04", "grad 0.612"]
RECORD = {"loss": 9.0, "lr": 1e-4, "grad_norm": 1.0, "images_per_s": 10.0, "model_tflops": 1.0}


@pytest.fixture
def terminal(monkeypatch):
    """(rows, columns) -> makes standard error a terminal; and returns what reads its text."""
    opened = []

    def open_terminal(rows, columns):
        outer, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        stream = os.fdopen(inner, "w", encoding="utf-8")
        monkeypatch.setattr(sys, "stderr", stream)
        opened.append((outer, stream))

        def read():
            stream.flush()
            text = b""
            while select.select([outer], [], [], 0.2)[0]:
                text += os.read(outer, 1 << 16)
            return text.decode()

        return read

    yield open_terminal
    for outer, stream in opened:
        stream.close()
        os.close(outer)


@pytest.fixture
def seconds(monkeypatch):
    """The clock that progress reads, in seconds, as a list of one number to change."""
    now = [100.0]
    for module in (progress, console):
        monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def drawn_lines(text):
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_a_bar_never_wraps(terminal, columns):
    read = terminal(24, columns)
    for what in ("training", "measuring /a/path/that/is/long/" + 9 * "and/longer/"):
        bar = progress.bar(what, 100_000, "steps")
        for step in (1, 12_345, 100_000):
            bar.at(step, NOTES)
        bar.close()
    lines = drawn_lines(read())
    assert len(lines) >= 4 and max(map(len, lines)) == columns - 1


def test_a_bar_has_the_notes_that_matter_most_at_80_columns_and_all_in_a_wide_terminal(terminal):
    read = terminal(24, 80)
    progress.bar("training", 100_000, "steps").at(12_345, NOTES)
    line = read()
    assert "training  12%|" in line and "| 12,345/100,000 steps  0:12:34 left  loss 0.2345" in line
    assert "images/s" not in line
    read = terminal(24, 200)
    progress.bar("training", 100_000, "steps").at(12_345, NOTES)
    assert "  ".join(["12,345/100,000 steps", *NOTES]) in read()


def test_a_terminal_of_size_0_shows_a_bar_of_80_columns(terminal):
    read = terminal(0, 0)
    bar = progress.bar("training", 100, "steps")
    bar.at(50, NOTES)
    bar.at(100, NOTES)
    bar.close()
    lines = drawn_lines(read())
    assert {len(line) for line in lines} == {79} and "100/100 steps" in lines[-1]


def test_a_bar_inside_another_is_erased(terminal):
    read = terminal(24, 80)
    outer = progress.bar("training", 10, "steps")
    outer.at(5)
    assert list(progress.track(range(3), 3, "measuring", "batches")) == [0, 1, 2]
    outer.at(10)
    outer.close()
    text = read()
    assert "measuring" in text and "100%" in text.splitlines()[-1]


def test_piped_progress_is_a_line_at_most_every_ten_seconds(capsys, seconds):
    for _ in progress.track(range(100), 100, "reading", "images"):
        seconds[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 11/100 images, 0:01:29 left"
    assert lines[-1] == "reading: 100 images in 100.0 s" and len(lines) == 10


def test_time_left_follows_from_parts_of_the_work_too(capsys, seconds):
    with progress.Progress("drawing", 100, "images") as shown:
        seconds[0] += 60.0  # a compilation, which does not count
        shown.at(0, "step 10/50", begun=10.0)
        seconds[0] += 20.0
        shown.at(0, "step 20/50", begun=20.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "drawing: 0/100 images, step 10/50",
        "drawing: 0/100 images, step 20/50, 0:02:40 left",
    ]


def test_a_failed_work_ends_without_a_last_line(capsys):
    with pytest.raises(OSError), progress.Progress("drawing", 100, "images"):
        raise OSError
    assert capsys.readouterr().err == ""


def test_a_smoothed_loss_is_the_weighted_mean_of_what_is_finite():
    smoothed = progress.Smoothed(decay=0.9)
    assert np.isnan(smoothed.mean)
    values = [5.0, 1.0, np.nan, 2.0, np.inf]
    for value in values:
        smoothed.add(value)
    weights = [0.81, 0.9, 1.0]
    assert smoothed.mean == pytest.approx(np.average([5.0, 1.0, 2.0], weights=weights))


def work(step):
    """Updates after the tenth cost three times as much."""
    return namedtuple("Work", "flops")(1e12 * (min(step, 10) + 3 * max(step - 10, 0)))


def test_lines_have_the_smoothed_loss_and_a_time_left_once_a_few_steps_were_timed(capsys, seconds):
    shown = console.Console(100, work)
    seconds[0] += 50.0  # the first update is slow
    for step in range(1, 13):
        shown.progress(step, 2.0 if step % 2 else 1.0)
        if step in (1, 9, 12):
            shown.show(RECORD | {"step": step})
        seconds[0] += 0.5 if step < 10 else 1.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/100  loss 2.0000  ") and "left" not in lines[0]
    assert "loss 1.5" in lines[1] and "left" not in lines[1]
    # At step 11 and half a second for each unit of work: 3 x 89 units are left.
    assert lines[2] == "about 0:02:13 to the end at 2 TFLOP/s, plus saves, previews and scores"
    assert lines[3].startswith("step 12/100  loss 1.4") and lines[3].endswith("left 0:02:12")
    assert len(lines) == 4


def test_a_new_compilation_starts_the_time_left_anew(capsys, seconds):
    shown = console.Console(1000, work)
    for step in range(1, 10):
        shown.progress(step, 1.0)
        seconds[0] += 20.0
    assert "about" in capsys.readouterr().out
    shown.start_clock()
    shown.progress(10, 1.0)
    shown.show(RECORD | {"step": 10})
    assert "left" not in capsys.readouterr().out


def test_a_bar_of_training_shows_loss_and_rates(terminal, capsys, seconds):
    read = terminal(24, 120)
    shown = console.Console(40, work)
    shown.progress(1, 2.0)
    shown.show(RECORD | {"step": 1, "mfu": 0.41, "skipped": 2})
    seconds[0] += 1.0
    shown.progress(2, 1.0)
    shown.close()
    assert capsys.readouterr().out == ""
    assert "2/40 steps  loss 1.4949  skipped 2  10 images/s  MFU 41.0%  lr 1.00e-04" in read()


@pytest.mark.parametrize(
    "fields",
    [
        {"sample.sampler": "ddpm", "sample.steps": 5},
        {"sample.eta": 1.0, "sample.steps": 10, "sample.guidance_scale": 2.0},
        {"sample.eta": 0.0, "sample.steps": 47, "sample.spacing": "log_snr"},
        {"sample.sampler": "dpm_solver", "sample.steps": 10, "sample.spacing": "log_snr"},
        {"sample.sampler": "heun", "sample.steps": 13, "sample.spacing": "karras"},
    ],
)
def test_progress_inside_a_batch_changes_no_bit_of_the_images(tiny_config, fields):
    tiny_config.update_from_flattened_dict(fields)
    mesh, ids = sharding.make_mesh(tiny_config), [3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97]
    params = textbook.perturbed(state.fresh_params(tiny_config, mesh), scale=0.3)
    by_batch, seen = sharding.batch_sharding(mesh), []

    class Shown:
        def at(self, done, note="", begun=0.0):
            seen.append((done, note, begun))

    jitted = draw.jit_draw(tiny_config, mesh, by_batch)
    whole = list(draw_batches.in_batches(jitted, params, ids, 8, by_batch))
    parts = list(draw_batches.Drawing(tiny_config, mesh).in_batches(params, ids, Shown()))
    assert [batch for batch, _ in parts] == [ids[:8], ids[8:]]
    for (_, expected), (_, drawn) in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(drawn, expected)
    rows = samplers.evaluations(tiny_config.sample.sampler, tiny_config.sample.steps)
    length = draw_batches.stretch_length(rows)
    assert seen[0] == (0, f"step {length}/{rows}", 8 * length / rows)
    assert len(seen) == 2 * rows // length and seen[-1] == (11, "", 0.0)


def test_stretches_are_equal_and_five_to_twenty_where_that_is_possible():
    for steps in range(1, 300):
        length = draw_batches.stretch_length(steps)
        assert steps % length == 0
    assert {steps: draw_batches.stretch_length(steps) for steps in (1, 20, 25, 50, 250, 1000)} == {
        1: 1, 20: 1, 25: 5, 50: 5, 250: 25, 1000: 50
    }  # fmt: skip


def test_the_summary_fits_80_columns_and_says_what_will_be_done(tiny_config, tmp_path):
    mesh = sharding.make_mesh(tiny_config)
    params = state.fresh_params(tiny_config, mesh)
    tiny_config.train.update(num_steps=500, sample_every_steps=50)
    tiny_config.eval.update(every_steps=1000, metrics=("swd", "kid"), num_in_training=2000)
    text = start_summary.described(tiny_config, range(1797), mesh, params, tmp_path, 100)
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80
    count = sum(x.size for x in jax.tree.leaves(params))
    words = " ".join(text.split())
    for part in (
        "1,797 images of digits, 8 x 8 x 1",
        f"U-ViT of {count:,} parameters: width 32, 3 blocks",
        "noise ddpm, cosine schedule; the network predicts eps optim AdamW image",
        "every 1,000 steps: swd, kid of 2,000 samples, and the loss on held-out images",
        "10 tokens (mask.kind patch), 0.002465 GFLOP",
        "500, of which 400 are left; batch 16; 8,000 images in all, 4.45 epochs, 19.7 GFLOP",
        f"{jax.device_count()} x cpu (data {jax.device_count()}, fsdp 1)",
        "time unknown",
        f"{tmp_path}: checkpoints every 400 steps, previews every 50,",
    ):
        assert part in words, part


def test_the_summary_of_phases_has_their_table():
    config = config_file.load(str(ROOT / "configs/phases_digits.py"))
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    text = start_summary.described(config, range(1797), mesh, {}, pathlib.Path("/w"), 0)
    assert max(map(len, text.splitlines())) <= 80
    assert "noise    ddpm, cosine schedule; the network predicts eps" in text
    assert "optim    AdamW\n" in text and "scores   none in training" in text
    assert "batch 32 / 32" in text and "share of FLOPs" in text and "1001 to 3200" in text


def test_the_summary_names_edm_and_muon():
    config = config_file.load(str(ROOT / "configs/edm_digits.py:edm"), ["optim.name=muon"])
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    text = start_summary.described(config, range(1797), mesh, {}, pathlib.Path("/w"), 0)
    assert "noise    edm, sigma_data 0.75\n" in text
    assert "optim    Muon on the matrices of the blocks, AdamW on all else\n" in text


def test_the_parameters_are_listed_on_request_and_a_resumed_run_expects_an_end(
    tiny_config, tmp_path, capsys
):
    tiny_config.train.update(num_steps=4, sample_every_steps=0)
    train.train(tiny_config, tmp_path, verbose=True)
    first = capsys.readouterr().out
    assert "| Name " in first and "time     unknown" in first
    assert re.search(r"memory +\d+\.\d\d GiB on each device", first)
    tiny_config.train.num_steps = 6
    train.train(tiny_config, tmp_path)
    again = capsys.readouterr().out
    assert "| Name " not in again
    assert re.search(r"time +about 0:00:\d\d to the end at the speed of this run's last 3", again)


def test_memory_of_a_gpu_is_what_jax_may_take(monkeypatch):
    device = namedtuple("Device", "memory_stats")(lambda: {"bytes_limit": 3 * 2**30})
    compiled = jax.jit(lambda x: x + 1).lower(np.zeros(2**20, np.float32)).compile()
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory.described(compiled) == "0.01 GiB on each device, of 3.00 GiB that JAX may take"


def test_help_lists_modes_common_fields_and_where_the_rest_is():
    def printed(flag):
        command = [sys.executable, "main.py", flag]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and not result.stderr
        return result.stdout

    text, every = printed("--help"), printed("--help_all")
    for part in ("  train  ", "  sample  ", "  evaluate  ", "--verbose", "docs/running.md"):
        assert part in text
    assert "--config.train.batch_size=256\n        images, over all devices" in text
    assert "--help_all lists the other" in text and len(text.splitlines()) < 130
    assert "--config.mask.block_size=" in every and "--config.mask.block_size=" not in text


@pytest.mark.parametrize(
    "given, added",
    [
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "x"}, True),
        ({}, False),  # JAX sees a TPU
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, False),  # a pod on Kubernetes
    ],
)
def test_libtpu_is_muted_only_on_a_machine_without_a_tpu(monkeypatch, given, added):
    monkeypatch.setattr(os, "environ", dict(given))
    distributed.mute_libtpu()
    assert ("TPU_PROCESS_BOUNDS" in os.environ) == added
    assert given.items() <= os.environ.items()


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_libtpu_prints_nothing_before_us_on_a_machine_without_a_tpu():
    code = "from maskdm_jax.run import distributed as d; d.mute_libtpu(); print(d.num_devices())"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "JAX_PLATFORMS"))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
