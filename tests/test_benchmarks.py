"""What the benchmarks report, without timing anything."""

import json
import re
import subprocess

import pytest

from benchmarks import cases, measure, run, sweep, train_step
from maskdm_jax import config as config_lib

OURS = {
    "device": "a card", "batch": 64, "images_per_s": 10.0, "evaluations_per_s": 2500.0, "mfu": 0.6,
    "mfu_datasheet": 0.4, "matmul_tflops": 700.0, "model_tflops": 420.0, "set_up_s": 9.0,
    "versions": {"jax": "0.11"},
}  # fmt: skip
PEER = {"batch": 32, "memory_gib": 70.0, "images_per_s": 8.0, "versions": {"torch": "2.11"}}


@pytest.mark.parametrize("name", cases.NAMES)
def test_every_case_is_a_shipped_config_that_is_valid(name):
    config = cases.config(name, "/data")
    config_lib.validate(config)
    assert config.train.batch_size == cases.CASES[name][1]
    assert config.data.cache == "device"


def test_every_point_of_the_sweep_is_valid_and_stands_once():
    points = list(sweep.points(["ratio", "size", "batch"]))
    for case, batch, fields in points:
        config_lib.validate(cases.config(case, "/data", batch, fields))
    keys = [json.dumps(point) for point in points]
    assert len(set(keys)) == len(keys)


def test_fields_take_the_type_of_their_default():
    fields = cases.parse_fields(["mask.ratio=0.5", "model.depth=3", "data.image_size=128,64"])
    assert fields == {"mask.ratio": 0.5, "model.depth": 3, "data.image_size": (128, 64)}


def test_a_row_compares_training_by_images_and_sampling_by_evaluations():
    row = run.row("whole256", OURS, PEER, "the command")
    assert row["ratio"] == 1.25 and row["peer_images_per_s"] == 8.0
    row = run.row("sample256", OURS, {**PEER, "evaluations_per_s": 1250.0}, "the command")
    assert row["ratio"] == 2 and row["peer_images_per_s"] == 5.0
    for field in ("bench", "device", "mfu", "mfu_datasheet", "batch", "command", "date"):
        assert row[field]
    assert row["versions"] == {"jax": "0.11", "torch": "2.11"}
    line = run.table([row]).splitlines()[-1]
    assert line.startswith("| sample256 | 64 | 10 | 60.0% of 700 TFLOP/s | 40.0% | 5 (32) | 2.00")


def test_the_peer_runs_at_the_largest_batch_that_fits_it(monkeypatch):
    asked = []

    def pretend(module, bench, options):
        batch = int(options[1])
        asked.append(batch)
        if batch > 16:
            return subprocess.CompletedProcess([], 1, "", "torch.OutOfMemoryError: out of memory")
        return subprocess.CompletedProcess([], 0, json.dumps({"batch": batch}) + "\n", "")

    monkeypatch.setattr(run, "_run", pretend)
    assert run.run_peer("whole256", 64, ["--seconds", "1"]) == {"batch": 16}
    assert asked == [64, 32, 16]


def test_another_failure_of_the_peer_is_told(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no such kernel")
    monkeypatch.setattr(run, "_run", lambda *a: failed)
    with pytest.raises(RuntimeError, match="no such kernel"):
        run.run_peer("whole256", 64, [])


@pytest.mark.parametrize(
    "name, kind",
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*)", "attention"),
        ("short_attention_forward_kernel", "attention"),
        ("gelu_backward_kernel__2", "GELU"),
        ("nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_splitK_NTN", "matmul"),
        ("input_reduce_fusion_77", "reductions"),
        ("fusion_571", "other fusions"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name, kind):
    assert next(k for k, pattern in train_step._KINDS if re.search(pattern, name)) == kind


def test_a_call_is_timed_after_warm_up_in_three_groups(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def call(i):
        now[0] += 1.0 if i < 5 else 0.1
        calls.append(i)

    assert measure.seconds_per_call(call, seconds=3) == pytest.approx(0.1)
    assert calls == list(range(len(calls))) and len(calls) == 5 + 1 + 3 * 10
