import json
import math
import threading

import jax
import pytest

from maskdm_jax import flops
from maskdm_jax.config import default_config
from maskdm_jax.run import files, lock
from maskdm_jax.run.telemetry import (
    Telemetry,
    add_scores,
    described_scores,
    read_metrics,
    read_scores,
)  # fmt: skip

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


def scores(step, key, **values):
    definition = {"n": 8, "weights": "ema", "sampler": "ddim", "steps": 2, "eta": 0.0}
    definition |= {"spacing": "timestep", "guidance_scale": 1.0, "reference_sha256": "ab" * 32}
    return {"step": step, "key": key, "scores": {"swd": 1.0} | values, "heldout_loss": {},
            "definition": definition, "floor": None}  # fmt: skip


def test_scores_that_are_not_finite_are_read_as_nan_and_can_be_told(tmp_path):
    record = scores(1, "one", fid=math.nan) | {"heldout_loss": {"ema": {"mean": math.inf}}}
    add_scores(tmp_path, record)
    (read,) = read_scores(tmp_path)
    assert "fid nan" in described_scores(read) and "loss (ema) nan" in described_scores(read)
    assert read["floor"] is None


def test_a_resuming_run_keeps_what_an_evaluation_beside_it_writes_meanwhile(tmp_path):
    add_scores(tmp_path, scores(9, "training, step 9"))
    with lock.hold(tmp_path, ".scores.lock"):
        with files.whole(tmp_path / "scores.jsonl") as unfinished:  # the evaluation's
            starting = threading.Thread(target=record, args=(tmp_path, 4, [5]))
            starting.start()
            starting.join(1)
            assert starting.is_alive()
            lines = [scores(9, "training, step 9"), scores(3, "evaluation")]
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines))
    starting.join(60)
    assert [r["key"] for r in read_scores(tmp_path)] == ["evaluation"]
