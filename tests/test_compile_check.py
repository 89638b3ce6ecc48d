"""The real programs of shipped configs, compiled for TPU slices on this machine's CPU."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="This needs libtpu, which has wheels for Linux on x86-64.",
)

SMALL = "--config.model.depth=1"  # for tests in which the number of layers does not matter
DRAWING = ("--mode=sample", SMALL)


def start(config, topology, *flags):
    # The command sets its own environment; the tests' would hide a missing part of it.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    command = [sys.executable, "launch/compile_check.py", f"--config=configs/{config}.py"]
    return subprocess.Popen(
        [*command, f"--topology={topology}", *flags],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def check(*args):
    return finish(start(*args))


def number(text, pattern):
    return float(re.search(pattern, text)[1].replace(",", ""))


@needs_libtpu
def test_both_stages_compile_for_16_chips_in_parallel_and_fit():
    # In parallel, because by default libtpu refuses a second process.
    stages = [start(f"{stage}_digits", "v5e-16") for stage in ("pretrain", "finetune")]
    for done in map(finish, stages):
        assert done.returncode == 0, done.stderr
        peak_gib = number(done.stdout, r"peak memory +([\d.]+) GiB of 16 GiB")
        assert number(done.stdout, r"arguments +([\d.]+)") < peak_gib < 16
        # Every gradient is reduced once: 1.19 million in float32.
        assert number(done.stdout, r"all-reduce ([\d.,]+) MB") == pytest.approx(4.77, rel=0.02)
        assert 0 < number(done.stdout, r"MFU +at most ([\d.]+)%") <= 100
        assert "it fits, with" in done.stdout


@needs_libtpu
def test_the_splash_kernel_compiles_in_a_step_and_its_flops_are_counted():
    small = ["model.depth=1", "train.batch_size=4", "data.cache=host", "optim.name=adamw"]
    done = check("finetune_celeba64", "v6e:2x2", *(f"--config.{field}" for field in small))
    assert done.returncode == 0, done.stderr
    model, compiled = (
        number(done.stdout, pattern) for pattern in (r"FLOPs +([\d.]+)", r"([\d.]+) as compiled")
    )
    # 7 of its 9 matmuls are the backward pass, which the model counts as 4; 257 tokens become 384.
    assert 1.1 < compiled / model < 1.4


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("config", ["pretrain_celeba64", "finetune_celebahq"])
def test_a_config_at_full_size_compiles_for_16_chips_and_fits(config):
    done = check(config, "v5e-16")
    assert done.returncode == 0, done.stderr
    assert "it fits, with" in done.stdout


@needs_libtpu
def test_pooled_blocks_compile_for_chips_that_share_the_state():
    fields = ("kind=block", "block_size=2", "pool_size=2", "hidden=pool")
    flags = [*(f"--config.mask.{field}" for field in fields), "--config.mesh.fsdp=4", SMALL]
    done = check("pretrain_digits", "v5e-4", *flags)
    assert done.returncode == 0, done.stderr
    assert "all-gather" in done.stdout  # of the weights, before they are used
    model, compiled = (
        number(done.stdout, pattern) for pattern in (r"FLOPs +(\S+)", r"(\S+) as compiled")
    )
    assert 1 < compiled / model < 1.2


@pytest.fixture(scope="module")
def ten_steps_drawn():
    """The output for the sampler with 10 steps of DDIM."""
    return check("finetune_digits", "v4-8", *DRAWING, "--config.sample.steps=10").stdout


@needs_libtpu
def test_the_sampler_compiles_and_its_loop_counts_once_per_iteration(ten_steps_drawn):
    few = ten_steps_drawn
    many = check("finetune_digits", "v4-8", *DRAWING, "--config.sample.steps=100").stdout
    for pattern in (r"FLOPs +([\d.]+)", r"([\d.]+) as compiled", r"HBM traffic +([\d.]+)"):
        assert number(many, pattern) == pytest.approx(10 * number(few, pattern), rel=0.02)


@needs_libtpu
def test_heun_compiles_for_tpus_and_costs_its_evaluations(ten_steps_drawn):
    fields = ("sampler=heun", "guidance_interval=(0.2,0.8)", "threshold=0.99", "steps=10")
    done = check("finetune_digits", "v4-8", *DRAWING, *(f"--config.sample.{f}" for f in fields))
    found, guided = (number(text, r"FLOPs +([\d.]+)") for text in (done.stdout, ten_steps_drawn))
    # Some of 19 evaluations are guided, and all of 10.
    assert 19 < found / (guided / 20) < 38


@needs_libtpu
def test_a_batch_that_is_too_large_does_not_fit_and_the_output_has_what_to_type():
    done = check("pretrain_digits", "v5e-4", "--config.train.batch_size=4194304")
    assert done.returncode == 1, done.stderr
    assert "exceeds available HBM" in done.stdout
    assert "it does not fit; type --config.optim.accumulate_steps=2" in done.stdout
    assert "--config.mesh.fsdp=4" in done.stdout


@needs_libtpu
def test_a_row_rounds_the_batch_up_until_it_divides():
    done = check("pretrain_digits", "v5p-128", "--row", "--config.train.batch_size=60", SMALL)
    assert done.stdout.startswith("| pretrain_digits | v5p-128 (4x4x4) | 64 |")
    assert done.stdout.rstrip().endswith("| yes |")


@pytest.mark.parametrize(
    "topology, flags, said",
    [
        ("v5e:3x3", (), "type --topology=v5e:4x4"),
        ("v9-16", (), "expected a chip of v4, v5e, v5p, v6e"),
        ("", (), "--topology is missing"),
        ("v5e-256", (), "type --config.train.batch_size=256"),
        ("v5e-16", ("--config.data.name=mine",), "type --num_examples=N"),
        ("v5e-16", ("--config=README.md",), "--config is "),
        ("v5e-16", ("--num_examples=0",), "num_examples"),
        ("v5e-16", ("--config.train.batchsize=1",), "is not a field of the config"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(topology, flags, said):
    done = check("pretrain_digits", topology, *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr
