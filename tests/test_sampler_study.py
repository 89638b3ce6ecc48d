"""The study of samplers: one scored row for each solver and number of evaluations."""

import itertools
import types

import pytest

from maskdm_jax.errors import ConfigError
from studies import compute_matched, samplers


def test_a_solver_takes_at_most_the_evaluations_that_it_is_given():
    assert samplers.Run("ddim:timestep:1", 20).fields() == {
        "sample.sampler": "ddim", "sample.spacing": "timestep", "sample.eta": 1.0,
        "sample.recompute_eps": False, "sample.steps": 20,
    }  # fmt: skip
    recomputed = samplers.Run("ddim:log_snr:recompute", 20).fields()
    assert recomputed["sample.recompute_eps"] and recomputed["sample.eta"] == 0
    assert samplers.Run("heun:karras", 20).fields()["sample.steps"] == 10  # 19 evaluations
    assert samplers.Run("heun:karras", 5).fields()["sample.steps"] == 3


def test_what_the_others_are_compared_with_comes_first_and_then_the_cheapest():
    solvers, (dear, cheap) = ["heun:karras", "ddim:timestep"], (250, 10)
    assert samplers.runs(solvers, [dear, cheap]) == [
        ("ddim:timestep", dear), ("heun:karras", cheap), ("ddim:timestep", cheap),
        ("heun:karras", dear),
    ]  # fmt: skip


def test_the_table_has_what_it_takes_to_equal_ddim_with_250_evaluations():
    scores = {("ddim:timestep", 20): 3.0, ("ddim:timestep", 250): 1.0, ("heun:karras", 20): 1.5,
              ("heun:karras", 250): 1.0, ("dpm_solver:log_snr", 20): 0.9}  # fmt: skip

    def table(name, of):
        rows = [
            {"solver": s, "budget": str(n), "evaluations": str(n), name: str(of(v)), "draw_s": "1"}
            for (s, n), v in scores.items()
        ]
        return samplers.table(rows).splitlines()

    lines = table("fid768", float)
    assert lines[0] == "| fid768 | 20 | 250 | reaches ddim:timestep:250 |"
    assert lines[2:] == [
        "| ddim:timestep | 3 | 1 | 250 |",
        "| heun:karras | 1.5 | 1 | 250 |",
        "| dpm_solver:log_snr | 0.9 | - | 20 |",
    ]
    assert table("recall768", lambda v: 4 - v)[2:] == [
        "| ddim:timestep | 1 | 3 | 250 |",
        "| heun:karras | 2.5 | 3 | 250 |",
        "| dpm_solver:log_snr | 3.1 | - | 20 |",
    ]


def test_rows_are_scored_and_continued(trained, data_dir, tmp_path, capsys, monkeypatch):
    argv = [
        f"--workdir={trained}", f"--out={tmp_path}", "--num=16", "--evaluations", "4", "2",
        "--config.eval.metrics=swd", f"--config.data.dir={data_dir}",
        "--config.sample.batch_size=16",
    ]  # fmt: skip
    samplers.main([*argv, "--solvers", "ddim:timestep", "heun:karras"])
    rows = compute_matched.read_rows(tmp_path / "samplers.csv")
    assert [(r["solver"], r["budget"], r["evaluations"]) for r in rows] == [
        ("ddim:timestep", "2", "2"), ("heun:karras", "2", "1"),
        ("ddim:timestep", "4", "4"), ("heun:karras", "4", "3"),
    ]  # fmt: skip
    assert all(float(r["swd"]) > 0 and r["n"] == "16" for r in rows)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        clock = types.SimpleNamespace(perf_counter=itertools.count(0, 10).__next__)
        patch.setattr(samplers, "time", clock)
        samplers.main([*argv, "--solvers", "ddim:timestep", "dpm_solver:log_snr", "--until=5"])
    said = capsys.readouterr().out
    assert "4 rows, of which 2 are not in" in said and "no time for 2 rows" in said
    assert "| heun:karras |" in said
    samplers.main([*argv, "--solvers", "ddim:timestep", "--config.sample.seed=1"])
    assert len(compute_matched.read_rows(tmp_path / "samplers.csv")) == 6


@pytest.mark.parametrize(
    "solver, said",
    [
        ("ddim", "--solvers has 'ddim'; expected SAMPLER:SPACING.*; type --solvers ddim:timestep$"),
        ("dmp_solver:log_snr", "type --solvers dpm_solver:log_snr:0.0$"),
        ("ddim:logsnr", "type --solvers ddim:log_snr:0.0$"),
        ("ddim:timestep:2", "type --solvers ddim:timestep:1$"),
        ("ddim:logsnr:recompute", "type --solvers ddim:log_snr:0.0:recompute$"),
        ("ddim:timestep:1:1", "type --solvers ddim:timestep$"),
    ],
)
def test_a_wrong_solver_is_one_sentence(solver, said):
    with pytest.raises(ConfigError, match=said):
        samplers.check([solver])
