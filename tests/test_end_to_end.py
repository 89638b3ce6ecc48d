"""main.py as a user runs it, in processes of its own, on the real digits."""

import json
import os
import re
import signal
import time

import pytest

from maskdm_jax import checkpoint
from maskdm_jax.run.telemetry import read_metrics


@pytest.fixture
def without_other_frameworks(tmp_path, monkeypatch):
    """Ends a process that imports TensorFlow or PyTorch."""
    traps = tmp_path / "traps"
    for name in ("tensorflow", "torch"):
        (traps / name).mkdir(parents=True)
        (traps / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')")
    paths = [str(traps), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_pretrain_finetune_sample_without_another_framework(
    run_main, tmp_path, without_other_frameworks
):
    first, second = tmp_path / "w1", tmp_path / "w2"
    steps = "--config.train.num_steps=120"
    fast = ["--config.train.log_every_steps=20", "--config.optim.warmup_steps=5"]
    result = run_main("pretrain_digits", first, steps, "--verbose", *fast)
    assert result.returncode == 0, result.stderr
    assert "\n| Name " in result.stdout and "\n| in_block_0/" in result.stdout
    losses = [r["loss"] for r in read_metrics(first)]
    assert losses[-1] < 0.7 * losses[0]
    assert json.loads((first / "config.json").read_text())["mask"]["kind"] == "patch"

    result = run_main("finetune_digits", first)  # in the workdir of the pre-training
    assert result.returncode == 2 and f"--config.init.path={first}" in result.stderr

    result = run_main("finetune_digits", second, steps, f"--config.init.path={first}", *fast)
    assert result.returncode == 0, result.stderr
    assert re.search(r"weights from .*w1 \(raw, step 120\): 47 restored\n", result.stdout)
    assert "| Name " not in result.stdout
    finetune = [r["loss"] for r in read_metrics(second)]
    # Fine-tuning starts where pre-training ended, not at a fresh model's loss of 1.
    assert finetune[0] < 0.7 * losses[0]
    assert (second / "previews" / "step_0000120.png").exists()

    result = run_main("finetune_digits", second, steps, f"--config.init.path={first}")
    assert result.returncode == 0 and "finished" in result.stdout
    assert "nothing to do" in result.stdout

    result = run_main(
        "finetune_digits", second, "--mode=sample", "--config.sample.num=5",
        "--config.sample.batch_size=4", "--config.sample.steps=5",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(list(second.glob("samples/*/00000?.png"))) == 5
    assert len(list(second.glob("samples/*/grid.png"))) == 1


@pytest.mark.parametrize("cache", ["none", pytest.param("device", marks=pytest.mark.slow)])
def test_kill_9_and_restart_equals_an_undisturbed_run(run_main, tmp_path, cache):
    flags = ["--config.train.num_steps=60", "--config.checkpoint.every_steps=5"]
    flags += [f"--config.data.cache={cache}"]
    flags += ["--config.train.log_every_steps=1", "--config.optim.accumulate_steps=2"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert run_main("pretrain_digits", calm, *flags).returncode == 0

    process = run_main("pretrain_digits", killed, *flags, wait=False)
    try:
        deadline = time.time() + 120
        while not (checkpoint.steps(killed) or [0])[-1] >= 10:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 10 <= checkpoint.steps(killed)[-1] < 60

    result = run_main("pretrain_digits", killed, *flags)
    assert result.returncode == 0, result.stderr
    assert "resuming from step" in result.stdout
    assert checkpoint.digest(killed) == checkpoint.digest(calm)
    assert [(r["step"], r["loss"]) for r in read_metrics(killed)] == [
        (r["step"], r["loss"]) for r in read_metrics(calm)
    ]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--config.mask.ration=0.5"], "ration"),
        (["--config.mask.ratio=0.99"], "mask.ratio is 0.99"),
        (["--config.data.name=cats"], "maskdm_jax.data.prepare"),
        (["--config.init.path=/nowhere"], "init.path /nowhere does not exist"),
        (["--mode=sample"], "holds no checkpoint"),
        (["--mode=dance"], "dance"),
        (["--config=configs/nope.py"], "configs/nope.py"),
        (["--config.train.num_steps=many"], "many"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(run_main, tmp_path, flags, expected):
    result = run_main("pretrain_digits", tmp_path / "w", *flags)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if "images in" not in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0]


def test_damaged_checkpoints_are_reported_and_never_start_a_run_afresh(run_main, tmp_path):
    flags = ["--config.train.num_steps=6", "--config.checkpoint.every_steps=2"]
    assert run_main("pretrain_digits", tmp_path, *flags).returncode == 0
    undisturbed = checkpoint.digest(tmp_path)

    def harm(step):
        (tmp_path / "checkpoints" / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")

    harm(6)
    sampled = run_main("pretrain_digits", tmp_path, "--mode=sample", "--config.sample.steps=2")
    assert sampled.returncode == 0 and "checkpoint 6" in sampled.stderr
    assert [p.name[:6] for p in (tmp_path / "samples").iterdir()] == ["step4_"]
    tuned = run_main(
        "finetune_digits", tmp_path / "w2", f"--config.init.path={tmp_path}",
        "--config.train.num_steps=1", "--config.train.sample_every_steps=0",
    )  # fmt: skip
    assert tuned.returncode == 0 and "(raw, step 4)" in tuned.stdout, tuned.stderr

    # A field without effect here.
    result = run_main("pretrain_digits", tmp_path, *flags, "--config.init.weights=ema")
    assert result.returncode == 0 and "resuming from step 4" in result.stdout
    assert "changed since this run began: init.weights (raw there, ema here)\n" in result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"checkpoint 6 of {tmp_path} is damaged")
    assert checkpoint.digest(tmp_path) == undisturbed

    for step in checkpoint.steps(tmp_path):
        harm(step)
    result = run_main("pretrain_digits", tmp_path, *flags)
    assert result.returncode == 2 and "every checkpoint in" in result.stderr
    assert checkpoint.steps(tmp_path) == [4, 6]
