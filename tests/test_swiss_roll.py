"""studies/swiss_roll.py: the distance, and the whole study at a budget of a few steps."""

import json

import numpy as np
import pytest

from maskdm_jax.data import toy
from studies import swiss_roll


def test_the_sliced_wasserstein_distance_of_a_shift_is_its_mean_projection():
    points = np.random.default_rng(0).normal(size=(500, 2))
    shift = np.array([0.3, -0.4])
    distance = swiss_roll.sliced_wasserstein(points, points[::-1] + shift)
    assert distance == pytest.approx(0.5 * 2 / np.pi, rel=1e-3)
    assert swiss_roll.sliced_wasserstein(points, points[::-1]) < 1e-12 * distance


def test_the_distance_sees_what_the_marginals_hide():
    points = toy.points("test")
    mixed = np.stack([points[:, 0], np.roll(points[:, 1], 1)], axis=1)
    far, floor = (
        swiss_roll.sliced_wasserstein(p, points) for p in (mixed, toy.points("train")[:10_000])
    )
    assert far > 5 * floor


def test_the_study_trains_each_arm_for_its_seconds_and_draws_both(tmp_path, monkeypatch):
    asked = []

    def train(config, workdir):
        asked.append((workdir.name, config.mask.kind, config.train.num_steps, config.init.path))

    monkeypatch.setattr(swiss_roll.train, "train", train)
    monkeypatch.setattr(
        swiss_roll,
        "step_seconds",
        lambda stages, data_dir: dict(zip(stages, (1, 2, 4), strict=True)),
    )
    monkeypatch.setattr(swiss_roll, "draw_points", lambda config, workdir: toy.points("test"))
    swiss_roll.main([f"--out={tmp_path}", "--seconds=100", "--seeds=1"])
    assert asked == [
        ("pretrain_seed0", "patch", 30, ""),
        ("finetune_seed0", "none", 35, f"{tmp_path}/pretrain_seed0"),
        ("scratch_seed0", "none", 25, ""),
    ]
    rows = [json.loads(line) for line in (tmp_path / "swiss_roll.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(swiss_roll.ARMS)
    assert all(row["sliced_wasserstein"] < 0.005 for row in rows)  # 8 bits
    assert (tmp_path / "swiss_roll.png").stat().st_size > 0


@pytest.mark.slow
def test_the_study_runs_from_end_to_end(tmp_path, monkeypatch):
    def config_of(stage, data_dir, seed):
        config = real(stage, data_dir, seed)
        config.model.update(width=16, depth=1, num_heads=1)
        config.train.batch_size, config.sample.steps = 16, 4
        config.sample.batch_size = 400
        return config

    real = swiss_roll.config_of
    monkeypatch.setattr(swiss_roll, "config_of", config_of)
    monkeypatch.setattr(swiss_roll, "_STEPS_PER_ROUND", 1)
    monkeypatch.setattr(toy, "_SIZES", {"train": 500, "test": 400})
    swiss_roll.main([f"--out={tmp_path}", "--seconds=0.01", "--seeds=1"])
    rows = [json.loads(line) for line in (tmp_path / "swiss_roll.jsonl").read_text().splitlines()]
    assert all(row["points"] == 400 and 0 < row["sliced_wasserstein"] < 2 for row in rows)
    assert min(min(row["step_ms"].values()) for row in rows) > 0
