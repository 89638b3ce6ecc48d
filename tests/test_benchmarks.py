"""What the benchmarks report, without timing anything."""

import json
import re
import subprocess

import pytest

from benchmarks import cases, input_pipeline, measure, run, scaling, sweep, train_step
from maskdm_jax import config as config_lib
from maskdm_jax import flops
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import memory

OURS = {
    "device": "a card", "batch": 64, "images_per_s": 10.0, "evaluations_per_s": 2500.0, "mfu": 0.6,
    "mfu_datasheet": 0.4, "matmul_tflops": 700.0, "model_tflops": 420.0, "set_up_s": 9.0,
    "versions": {"jax": "0.11"},
}  # fmt: skip
PEER = {"batch": 32, "memory_gib": 70.0, "images_per_s": 8.0, "versions": {"torch": "2.11"}}


@pytest.mark.parametrize("name", [*cases.NAMES, *cases.POOLED])
def test_every_case_is_a_shipped_config_that_is_valid(name):
    config = cases.config(name, "/data")
    config_lib.validate(config)
    assert config.train.batch_size == (cases.CASES | cases.POOLED)[name][1]
    assert config.data.cache == "device"


def test_the_pooled_cases_have_the_token_counts_that_the_kernels_are_tested_at():
    lengths = [flops.tokens_per_image(cases.config(name, "/data")) for name in cases.POOLED]
    assert lengths == [647, 170, 86]


def test_every_point_of_the_sweep_is_valid_and_appears_once():
    points = list(sweep.points(["ratio", "size", "batch"]))
    for case, batch, fields in points:
        config_lib.validate(cases.config(case, "/data", batch, fields))
    keys = [json.dumps(point) for point in points]
    assert len(set(keys)) == len(keys)


def test_the_command_line_changes_fields_of_a_case():
    parser = cases.parser("", "train_step", cases.NAMES)
    flags = ["--config.mask.ratio=0.5", "--config.data.image_size=128,64", "--batch=8"]
    config = cases.chosen(parser.parse(["--bench=masked256", *flags]), "train")
    assert (config.mask.ratio, config.data.image_size) == (0.5, (128, 64))
    assert config.train.batch_size == 8 and config.model.size == "B"
    # run.py halves the peer's batch, whatever else is typed.
    flags += ["--config.train.batch_size=64"]
    assert cases.chosen(parser.parse(["--bench=masked256", *flags]), "train").train.batch_size == 8


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


def test_the_peers_batch_is_halved_until_it_fits(monkeypatch):
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


def test_a_batch_and_fields_that_are_typed_change_ours_and_the_peer(monkeypatch, tmp_path, capsys):
    asked = []

    def pretend(module, bench, options):
        asked.append((module, bench, options))
        result = PEER if module.endswith("peer_torch") else OURS
        return subprocess.CompletedProcess([], 0, json.dumps(result) + "\n", "")

    monkeypatch.setattr(run, "_run", pretend)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    flags = ["--batch=64", "--seconds=2", "--data_dir=D", "--config.model.size=S"]
    monkeypatch.setattr("sys.argv", ["run", "--bench", "pooled64", "pooled128", *flags])
    run.main()
    both = ["--batch", "64", "--seconds", "2", "--config.model.size=S", "--data_dir", "D"]
    modules = ("benchmarks.train_step", "benchmarks.peer_torch")
    assert asked == [(m, bench, both) for bench in ("pooled64", "pooled128") for m in modules]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| pooled")]
    assert [row.split()[1] for row in rows] == ["pooled64", "pooled128"]
    command = "python -m benchmarks.run --bench pooled64 pooled128 --batch 64 --seconds 2"
    stored = json.loads((tmp_path / "results.json").read_text())
    assert {row["command"] for row in stored} == {f"{command} --config.model.size=S"}


def test_other_failures_of_the_peer_are_reported(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no such kernel")
    monkeypatch.setattr(run, "_run", lambda *a: failed)
    with pytest.raises(RuntimeError, match="no such kernel"):
        run.run_peer("whole256", 64, [])


def test_efficiency_is_the_rate_per_gpu_over_the_rate_of_one_gpu(monkeypatch):
    asked = []

    def pretend(module, bench, options, **env):
        asked.append((options[1], env))
        num_gpus, rate = (1, 10000.0) if env else (2, 19400.0)
        result = {**OURS, "memory_gib": 7.0, "num_devices": num_gpus, "images_per_s": rate}
        result["batch"] = int(options[1])
        return subprocess.CompletedProcess([], 0, json.dumps(result) + "\n", "")

    monkeypatch.setattr(run, "_run", pretend)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    one, together = scaling.bench("whole256", 32, 2, [])
    assert asked == [("32", {"CUDA_VISIBLE_DEVICES": "3"}), ("64", {})]
    row = scaling.row("whole256", one, together, "the command")
    assert row["efficiency"] == 0.97 and row["bench"] == "whole256 on 2 GPUs" and row["batch"] == 64
    for field in ("device", "images_per_s", "mfu", "versions", "command", "date"):
        assert row[field]
    line = scaling.table([row]).splitlines()[-1]
    assert line == "| whole256 | 2 | 32 | 10,000.0 | 19,400.0 | 0.970 |"


@pytest.mark.parametrize(
    "arguments, num_gpus, expected",
    [
        ([], 1, "JAX sees 1 GPUs; expected at least 2"),
        (["--bench", "whole256:0"], 2, "--bench is 'whole256:0'; expected masked256, "),
        (["--bench", "sample256"], 2, "--bench is 'sample256'"),
    ],
)
def test_scaling_refuses_what_it_cannot_measure(monkeypatch, arguments, num_gpus, expected):
    monkeypatch.setattr("sys.argv", ["scaling", *arguments])
    monkeypatch.setattr(scaling, "count_gpus", lambda: num_gpus)
    with pytest.raises(ConfigError) as error:
        scaling.main()
    assert expected in str(error.value)


def test_mfu_is_per_device(monkeypatch, tiny_config):
    monkeypatch.setattr(train_step, "compile_step", lambda config: None)
    monkeypatch.setattr(train_step, "start", lambda config, compiled: None)
    monkeypatch.setattr(memory, "bytes_needed", lambda compiled: 2**30)
    monkeypatch.setattr(measure, "seconds_per_call", lambda call, seconds: 0.5)
    monkeypatch.setattr(measure, "matmul_tflops", lambda: 1.0)
    result, _ = train_step.bench(tiny_config, seconds=1)
    assert result["num_devices"] == 8 and result["images_per_s"] == 2 * 16
    assert result["mfu"] == pytest.approx(2 * 16 * flops.training_flops(tiny_config) / 1e12 / 8)


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
def test_kernels_are_sorted_into_kinds_by_name(name, kind):
    assert next(k for k, pattern in train_step._KINDS if re.search(pattern, name)) == kind


def test_a_call_is_timed_after_warm_up_in_three_groups(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def call(i):
        now[0] += 1.0 if i < 5 else 0.1
        calls.append(i)

    assert measure.seconds_per_call(call, seconds=3) == pytest.approx(0.1)
    assert calls == list(range(len(calls))) and len(calls) == 5 + 1 + 3 * 10


def test_the_input_rate_of_each_cache_is_compared_with_the_steps(data_dir, capsys):
    fields = ["data.name=digits", "data.image_size=8,8", "data.channels=1", "train.batch_size=16"]
    command = ["--bench=masked64", f"--data_dir={data_dir}", "--seconds=0.1", "--need=10"]
    input_pipeline.main([*command, *(f"--config.{field}" for field in fields)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["cache"] for row in rows] == ["none", "host", "device"]
    for row in rows:
        assert row["ratio"] == row["images_per_s"] / 10 and row["image_size"] == 8
    latest = [r for r in json.loads(run.RESULTS.read_text()) if r["bench"] == "masked256"][-1]
    assert input_pipeline.needed("masked256") == latest["images_per_s"]
    with pytest.raises(ConfigError, match="maskdm_jax.data.prepare"):
        input_pipeline.main([*command, "--config.data.name=cats"])
