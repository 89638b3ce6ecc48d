import json

import jax
import pytest

from maskdm_jax import flops
from maskdm_jax.config import default_config
from maskdm_jax.run.telemetry import Telemetry, read_metrics

METRICS = {"loss": 0.5, "lr": 1e-4, "grad_norm": 1.0}


def work(step):
    """A batch of 100 up to step 1, and of 10 afterwards, with 1 GFLOP per image."""
    images = 100 * min(step, 1) + 10 * max(step - 1, 0)
    return flops.Work(images, 5 * images, 1e9 * images)


def record(workdir, first, steps, peak=None):
    telemetry = Telemetry(workdir, default_config(), first, work, peak)
    for step in steps:
        telemetry.log(step, METRICS)
    telemetry.close()


def test_records_have_rates_and_mfu_if_the_peak_is_known(tmp_path):
    record(tmp_path, 0, [1, 2], peak=10.0)
    first, second = read_metrics(tmp_path)
    assert (first["step"], second["step"]) == (1, 2)
    assert second["images_per_s"] * second["step_s"] == pytest.approx(10)
    assert (second["images"], second["tokens"], second["model_flops"]) == (110, 550, 110e9)
    assert second["model_tflops"] == pytest.approx(second["images_per_s"] * 1e9 / 1e12)
    assert second["mfu"] == second["model_tflops"] / 10
    assert second["device"] == f"{jax.device_count()} x cpu"
    assert list((tmp_path / "tensorboard").iterdir())


def test_resuming_drops_records_beyond_the_checkpoint(tmp_path):
    record(tmp_path, 0, [1, 2, 3, 4])
    record(tmp_path, 2, [3])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    assert "mfu" not in read_metrics(tmp_path)[0]


def test_a_line_cut_short_is_left_out(tmp_path):
    record(tmp_path, 0, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 2, "loss": 1.0})[:-5])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    good = '{"step": 1, "loss": 0.5}\n'
    lines = (
        good.encode() + b'\0\0{"step": 2}\n\xff\xfe}\n{"step": 3}\n[4]\n{"step": "5", "loss": 1}'
    )
    (tmp_path / "metrics.jsonl").write_bytes(lines + b"\n" + good.encode().replace(b"1", b"6"))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 6]
