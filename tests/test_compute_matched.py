"""The study's runner and its page: equal seconds in, one row each out."""

import functools
import json
import math
import operator
import re
import signal
import statistics
import sys
import textwrap
import time

import pytest
from conftest import ROOT

from maskdm_jax import checkpoint
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import lock
from maskdm_jax.run.command_line import TRY_AGAIN
from studies import arms, budget, compute_matched, page, plots, points


def row(arm="scratch", seconds=120.0, seed=0, fid=2.0, **more):
    phase = budget.Phase(17, 64, 100, 10.0, 2.5)
    return {
        "arm": arm, "seconds": seconds, "seed": seed, "fid768": fid, "memorisation_share768": 0.01,
        "floor": 0.07, "heldout_loss": 0.05, **{f"loss {n}": 0.1 for n in points.BINS},
        "trained_s": seconds, "images": 6400, "pflop": 1.5, "set_up_s": 30, "scoring_s": 60,
        "phases": json.dumps([phase._asdict()]), "n": 5000, "steps": 50, "device": "1 x H100",
        "reference_sha256": "a" * 64, "network_sha256": "b" * 64,
    } | more  # fmt: skip


def as_text(rows, score="fid768"):
    return [{score if k == "fid768" else k: str(v) for k, v in r.items()} for r in rows]


def as_points(*rows, score="fid768"):
    return points.of_rows(as_text(rows, score), score)


def test_seeds_are_averaged_and_the_best_arm_comes_first():
    found = as_points(row(fid=2.0), row(seed=1, fid=4.0), row("drop_60", fid=1.0))
    assert [(p.arm, p.family, p.score) for p in found] == [
        ("drop_60", "drop", 1.0), ("scratch", "scratch", 3.0)
    ]  # fmt: skip


def test_the_time_to_a_score_follows_the_line_through_two_budgets():
    arm = as_points(*(row("drop_60", s, fid=(s / 600) ** -0.5) for s in (120.0, 300.0, 600.0)))
    seconds, bound = points.seconds_to(arm, (450 / 600) ** -0.5)
    assert seconds == pytest.approx(450) and not bound
    assert points.seconds_to(arm, arm[-1].score * 3) == (120.0, True)  # met by the shortest run
    assert points.seconds_to(arm, 0.99) is None


def test_the_factor_compares_with_the_best_scratch_run_of_each_budget():
    found = as_points(
        row("scratch_b32", fid=3.0), row(fid=2.0), row(seconds=480.0, fid=1.0),
        row("drop_60", fid=1.0), row("pool_60", 480.0, fid=0.5),
    )  # fmt: skip
    rows = page.factors(points.reached(found))
    assert rows == [
        ["2 (scratch, 120 s)", "drop_60", "at most 120 s", "at least 1.00", ""],
        ["1 (scratch, 480 s)", "pool_60", "at most 480 s", "at least 1.00", ""],
        ["1 (scratch, 480 s)", "drop_60", "at most 120 s", "at least 4.00", ""],
    ]


def test_the_range_of_a_factor_is_that_of_two_standard_errors_of_both_means():
    seeds = {"scratch": (1.0, 1.0, 1.06), "drop_60": (1.02, 1.0, 1.04)}
    rows = [
        row(arm, {"scratch": 480.0, "drop_60": 240.0}[arm], seed, fid)
        for arm, fids in seeds.items()
        for seed, fid in enumerate(fids)
    ]
    line = [row("drop_60", 120.0, fid=2 * 1.02), row("drop_60", 480.0, fid=0.51)]
    (found,) = points.reached(as_points(*rows, *line))
    error = 2 * math.hypot(statistics.stdev((1.02, 1.0, 1.04)), statistics.stdev((1.0, 1.0, 1.06)))
    error /= 1.02 * math.sqrt(3)  # both means are 1.02
    # The arm's score halves with twice the seconds.
    assert found.factor == 2 and found.range == pytest.approx((2 * (1 - error), 2 * (1 + error)))
    (one_seed,) = points.reached(as_points(rows[0], *rows[3:], *line))
    assert one_seed.range is None
    (no_longer,) = points.reached(as_points(*rows, line[0]))
    assert no_longer.range is None


def test_of_the_scores_that_the_docs_name_those_are_better_higher():
    lines = re.findall(r"^\| `\w+` \| (.*?) \| higher", (ROOT / "docs/scores.md").read_text(), re.M)
    names = re.findall(r"`(\w+)`", " ".join(lines))
    assert len(names) == 5 and all(points.sign(name) == -1 for name in names)
    assert all(points.sign(name) == 1 for name in ("fid768", "kid64", "swd", "swd_64"))


def test_a_score_of_which_higher_is_better_is_ranked_and_reached_so(tmp_path):
    rows = [row(seconds=240.0, seed=i, fid=0.39 + i / 100) for i in range(3)] + [row(fid=0.3)]
    line = ((120.0, 0.2), (240.0, 0.4), (480.0, 0.8))
    rows += [row("drop_60", s, i, fid + (i - 1) / 1000) for s, fid in line for i in range(3)]
    found = as_points(*rows, score="recall768")
    assert [p.arm for p in found if p.seconds == 120] == ["scratch", "drop_60"]
    first, second = points.reached(found)  # the arm's score doubles with the seconds
    assert (first.value, first.seconds) == (0.3, pytest.approx(180))
    error = 2 * math.hypot(0.01, 0.001) / math.sqrt(3) / 0.4
    assert second.range == pytest.approx((1 / (1 + error), 1 / (1 - error)))
    page.write_page(as_text(rows, "recall768"), tmp_path)
    assert "Higher is better" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("last", [-0.01, 0.0, math.nan])
def test_a_score_may_be_0_or_less_or_nan(tmp_path, last):
    fids = {("scratch", 240.0): last / 2, ("drop_60", 120.0): 0.01, ("drop_60", 240.0): last}
    rows = [row(*key, seed, fid) for key, fid in fids.items() for seed in (0, 1)]
    rows += [row("pool_60", 240.0, fid=1e-3)]
    page.write_page(as_text(rows, "kid768"), tmp_path)
    found = as_points(*rows, score="kid768")
    if math.isnan(last):
        assert not points.reached(found) and found[0].arm == "pool_60"
        return
    until = 240 if last == 0 else 120 * 2 ** (0.015 / 0.02)
    assert [r.seconds for r in points.reached(found)] == [pytest.approx(until)]
    axes = plots.plot_scores(found, math.nan, "kid768").axes
    assert min(point.score for point in found) >= axes[0].get_ylim()[0]


def test_the_plot_of_one_point_has_it_in_the_middle():
    for axis in plots.plot_scores(as_points(row()), math.nan, "fid768").axes:
        point = axis.transScale.transform(axis.containers[0].lines[0].get_xydata()[0])
        assert axis.transLimits.transform(point) == pytest.approx([0.5, 0.5])


def test_a_budget_at_which_scratch_is_behind_a_shorter_run_of_it_has_no_factor():
    found = as_points(row(fid=2.0), row("scratch_b32", 180.0, fid=3.0), row("drop_60", fid=2.5))
    assert points.reached(found) == []


def test_a_held_out_loss_is_reached_at_its_own_time_and_so_is_each_of_its_levels():
    low, high = f"loss {points.BINS[-1]}", f"loss {points.BINS[0]}"
    runs = [row(heldout_loss=0.06, **{low: 0.4}), row(seconds=480.0, fid=1.0, heldout_loss=0.05)]
    runs += [row("drop_60", heldout_loss=0.055, **{low: 0.2, high: 0.2})]
    runs += [row("drop_60", 480.0, heldout_loss=0.045, **{low: 0.05, high: 0.15})]
    found = as_points(*runs, row("drop_90", **{low: 0.01}))  # one budget: no line of its own
    heldout = operator.attrgetter("heldout")
    first, _, second, _ = points.reached(found, heldout, heldout)
    assert (first.value, first.seconds, first.is_bound) == (0.06, 120, True)
    until = 120 * 4 ** (math.log(0.055 / 0.05) / math.log(0.055 / 0.045))
    assert second.seconds == pytest.approx(until) and second.factor == pytest.approx(480 / until)
    levels = points.reached_by_level(found)
    assert list(levels) == [("drop_60", 120.0), ("drop_60", 480.0)]
    assert levels["drop_60", 480.0][0] is None and levels["drop_60", 480.0][-1].seconds == 240
    (axis,) = plots.plot_factors(levels).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    drawn = lines["drop_60\nto scratch, 480 s"]
    assert math.isnan(drawn[0][1]) and drawn[-1] == [9, 2]
    assert lines["at least"][-1] == [9, 1]


def test_scratch_is_ranked_by_the_loss_where_that_is_asked_for():
    runs = [row(heldout_loss=0.06), row("scratch_b32", fid=3.0, heldout_loss=0.05)]
    found = as_points(*runs, row("drop_60", heldout_loss=0.04))
    heldout = operator.attrgetter("heldout")
    assert [r.scratch.arm for r in points.reached(found, heldout)] == ["scratch"]
    assert [r.scratch.arm for r in points.reached(found, heldout, heldout)] == ["scratch_b32"]


def test_families_are_compared_where_scratch_and_another_were_run():
    both = [row(), row("drop_60"), row(seconds=300.0), row("drop_60", 600.0)]
    assert points.compared_budget(as_points(*both)) == 120
    assert points.compared_budget(as_points(row(), row(seconds=300.0))) == 300


def test_arms_are_shown_at_the_budget_that_most_of_them_had():
    most = [row(), row(arm="drop"), row(arm="pool"), row(seconds=300.0)]
    assert points.widest_budget(as_points(*most)) == 120


def test_the_curves_are_those_of_the_best_arms_and_of_those_with_several_budgets():
    often = [row("scratch_b32", s, fid=5.0) for s in (120.0, 300.0)]
    best = [row(), row(seconds=300.0), row("drop_60", fid=1.0)]
    found = as_points(*best, *often, row("drop_90", fid=3.0))
    assert {p.arm for p in points.outstanding(found)} == {"scratch", "scratch_b32", "drop_60"}


def test_the_seconds_until_scratchs_score_are_those_of_the_best_arm_of_each_family():
    runs = [row(fid=2.0), row(seconds=300.0, fid=1.5), row("drop_60", fid=1.9)]
    runs += [row("drop_60", 240.0, fid=1.4), row("drop_90", 240.0, fid=1.1)]
    runs += [row("drop_90", fid=2.5)]
    (axis,) = plots.plot_seconds(points.reached(as_points(*runs))).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    first = 120 * 2 ** (math.log(2.5 / 1.5) / math.log(2.5 / 1.1))  # drop_90's, drop_60 needs more
    assert lines["drop"] == [[120, 120], [300, pytest.approx(first)]]
    assert lines["at most"] == [[120, 120]]
    assert lines["half the seconds"] == [[120, 60], [300, 150]]


def test_the_page_needs_no_other_file_and_names_every_arm(tmp_path):
    rows = [row("drop_60", fid=1.0), row(), row(seconds=300.0, fid=1.5)]
    page.write_page(as_text(rows), tmp_path, grids=tmp_path)
    text = (tmp_path / "page.html").read_text()
    assert text.count("The tables have every arm.") == 4 and text.count("Without a picture.") == 2
    assert "http" not in text and text.count("data:image/png") == 4  # no other arm has two budgets
    assert all(f"<td>{name}</td>" in text for name in ("drop_60", "scratch"))


def test_an_arm_that_only_a_run_longer_than_scratchs_could_compare_is_not_said_to_fail(tmp_path):
    rows = [row("drop_60", 300.0, fid=1.0), row("pool_60", fid=3.0)]
    for shown, says in (([*rows, row()], "in scratch's time"), (rows, "no run of scratch")):
        page.write_page(as_text(shown), tmp_path)
        assert says in (tmp_path / "page.html").read_text()
        assert not (tmp_path / "seconds.png").exists()  # without two budgets of scratch


def test_what_was_not_measured_is_left_out_of_the_page(tmp_path):
    digits = {"floor": "", "heldout_loss": "", "memorisation_share768": "", "network_sha256": ""}
    digits |= {f"loss {name}": "" for name in points.BINS}
    rows = [row(**digits), row("drop_60", fid=1.0, **digits)]
    (tmp_path / "noise_levels.png").write_bytes(b"of other rows")
    page.write_page(as_text(rows), tmp_path)
    text = re.sub("<img[^>]*>", "", (tmp_path / "page.html").read_text())
    assert "nan" not in text and "floor" not in text and "final held-out loss" not in text
    assert not (tmp_path / "noise_levels.png").exists()


@pytest.mark.parametrize(
    ("images", "ticks"),
    [
        ((0.1, 4.0), ["0.1", "0.2", "0.5", "1", "2"]),
        ((0.11, 0.64), ["0.15", "0.2", "0.3", "0.5"]),
        ((0.03, 0.08), ["0.03", "0.04", "0.05", "0.06", "0.07", "0.08"]),
        ((96, 120), ["95", "100", "105", "110", "115", "120"]),
        ((0.01, 4.0), ["0.01", "0.03", "0.1", "0.3", "1", "3"]),
    ],
)
def test_a_plot_has_round_ticks_for_its_range(images, ticks):
    found = as_points(*(row(seconds=120.0 * count, images=count * 1e6) for count in images))
    axis = plots.plot_scores(found, math.nan, "fid768").axes[1]
    low, high = axis.get_xlim()
    shown = [t.get_text() for t in axis.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert shown == ticks


def test_scores_that_are_not_finite_are_no_reason_for_a_page_to_fail():
    found = as_points(row(fid=math.nan), row("drop_60", fid=math.nan))
    assert plots.plot_scores(found, math.nan, "fid768")
    assert plots.plot_arms(found, math.nan, "fid768", 120.0)


def test_a_page_has_one_device_and_one_definition_of_its_scores(tmp_path):
    path = tmp_path / "rows.csv"
    for found in (row(), row("drop_60"), row("drop_60", device="1 x H200"), row(n=2000)):
        compute_matched.add_row(path, found)
    argv = [f"--rows={path}", f"--out={tmp_path}"]
    with pytest.raises(
        ConfigError, match="n is 5000 or 2000; expected one alone; type --rows=FILE"
    ):
        page.main(argv)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="device is 1 x H100 or 1 x H200; .*--device='1 x H100'"):
        page.main(argv)
    with pytest.raises(ConfigError, match="--device has 'H100', of which .* has no row"):
        page.main([*argv, "--device=H100"])
    with pytest.raises(ConfigError, match="--arms has 'drop', .*; type --arms scratch"):
        page.main([*argv, "--arms", "scratch", "drop"])
    other = ["--arms", "scratch", "--device=1 x H200"]
    with pytest.raises(ConfigError, match="has no row of scratch; expected 1 x H100;"):
        page.main([*argv, *other])
    page.main([*argv, "--device=1 x H100"])
    text = (tmp_path / "page.html").read_text()
    assert "1 x H100" in text and "H200" not in text and "<td>drop_60</td>" in text
    page.main([*argv, "--device=1 x H100", "--arms", "scratch"])
    assert "<td>drop_60</td>" not in (tmp_path / "page.html").read_text()


def test_rows_with_other_columns_are_not_mixed(tmp_path):
    compute_matched.add_row(tmp_path / "rows.csv", {"arm": "a", "fid768": 1.0})
    compute_matched.add_row(tmp_path / "rows.csv", {"arm": "b", "fid768": 2.0})
    rows = compute_matched.read_rows(tmp_path / "rows.csv")
    assert rows == [{"arm": "a", "fid768": "1.0"}, {"arm": "b", "fid768": "2.0"}]
    with pytest.raises(ConfigError, match="row: fid192, fid768; type mv .*rows.csv .*rows.old.csv"):
        compute_matched.add_row(tmp_path / "rows.csv", {"arm": "c", "fid192": 1.0})


def test_a_run_that_was_begun_keeps_its_phases_and_its_device(tmp_path):
    folder, phase = tmp_path / "runs", budget.Phase(17, 64, 100, 10.0, 2.5)
    arm = [(1.0, {"phases": ((0.5, {}), (0.5, {}))})]
    what = {"settings": arm, "device": "1 x H100"}
    begun = budget.Begun(folder, what)
    begun.add([phase])
    time.sleep(0.05)
    begun.keep()
    again = budget.Begun(folder, what)
    assert again.phases(0) == [phase] and again.phases(1) == []
    assert again.seconds() > 0.05
    for other in ({"settings": arm[:0]}, {"device": "1 x H200"}):
        with pytest.raises(ConfigError, match=f"type rm -r {folder}"):
            budget.Begun(folder, what | other)
    for text in ('{"what": {', '{"what": 3}', "[]"):
        (folder / "begun.json").write_text(text)
        with pytest.raises(ConfigError, match=f"begun.json is damaged .*; type rm -r {folder}"):
            budget.Begun(folder, what)


def test_typed_fields_that_change_an_update_are_another_run(tmp_path):
    (tmp_path / "study.py").write_text(textwrap.dedent(STUDY))
    study = arms.load(str(tmp_path / "study.py"))
    ((_, given),) = arm = study.ARMS["pool_75"]
    typed = ["seed=0", "data.dir=/elsewhere", "eval.num=8"]
    assert arms.with_typed(study, "pool_75", typed) == arm  # the study's own seed
    config = arms.base(study, [*typed, "optim.lr_peak=0.5"])
    assert (config.data.dir, config.eval.num) == ("/elsewhere", 8)
    assert config.optim.lr_peak == study.get_config().optim.lr_peak
    made = arms.with_typed(study, "pool_75", ["optim.lr_peak=0.5"])
    assert made == [(1.0, given | {"optim.lr_peak": 0.5})]


def test_what_a_run_sets_itself_is_refused_and_so_is_a_batch_of_samples_that_does_not_divide(
    tmp_path,
):
    (tmp_path / "study.py").write_text(textwrap.dedent(STUDY))
    study = arms.load(str(tmp_path / "study.py"))
    for typed in ("seed=7", "train.num_steps=3", "init.path=/w"):
        with pytest.raises(ConfigError, match="each run sets .* itself; expected --seeds or"):
            arms.configs(study, "pool_75", [typed])
    with pytest.raises(ConfigError, match="sample.batch_size is 12"):
        arms.configs(study, "pool_75", ["sample.batch_size=12"])


@pytest.mark.parametrize("name", ["faces128", "faces128_patch2", "faces64", "transfer64"])
def test_every_arm_of_a_shipped_study_is_a_run(name):
    study = arms.load(str(ROOT / "studies" / f"{name}.py"))
    for arm in study.ARMS:
        arms.configs(study, arm, [])


@pytest.mark.parametrize(
    "text, says",
    [
        ("ARMS = {", "line 1: SyntaxError"),
        ("ARMS = {}", "no get_config and no PIECES"),
        ("ARMS['low'] = arm", "line .*: NameError"),
        ("ARMS = {'pool_60': [(1.0, {})]}", "piece all has the arm 'pool_75'"),
    ],
)
def test_a_study_file_that_is_none_is_one_sentence(tmp_path, text, says):
    start = "" if says.startswith(("line 1:", "no get_config")) else textwrap.dedent(STUDY)
    (tmp_path / "study.py").write_text(start + text)
    with pytest.raises(ConfigError, match=says):
        arms.load(str(tmp_path / "study.py"))


def test_what_cannot_be_trained_or_scored_is_refused_before_an_arm_trains(tmp_path, monkeypatch):
    text = textwrap.dedent(STUDY) + "ARMS['low'] = [(1.0, {'optim.lr_peak': -1.0})]\n"
    (tmp_path / "study.py").write_text(text)
    monkeypatch.setattr(compute_matched, "run_arm", lambda *_: pytest.fail("it trains"))
    argv = [f"--study={tmp_path / 'study.py'}", f"--out={tmp_path / 'out'}"]
    says = "arm low of .*study.py: optim.lr_peak is -1.0; expected .*; correct the arm"
    with pytest.raises(ConfigError, match=says):
        compute_matched.main([*argv, "--arms", "pool_75", "low"])
    scored = ["--config.eval.metrics=fid", f"--config.eval.inception_weights={tmp_path / 'none'}"]
    with pytest.raises(ConfigError, match="none is not a file; .* type .*inception_weights=FILE"):
        compute_matched.main([*argv, "--arms", "pool_75", *scored])


def test_an_out_has_one_config_and_one_setting_for_each_arm_from_its_first_run_on(
    tmp_path, monkeypatch
):
    path, out = tmp_path / "study.py", tmp_path / "out"
    path.write_text(textwrap.dedent(STUDY))
    made = []

    def run_arm(study, run, changes, out):
        made.append(run)
        arms.check_settings(study, run.arm, changes, out, keep=True)  # as if its training began
        if run.seed == 0:
            sys.exit("stopped")

    monkeypatch.setattr(compute_matched, "run_arm", run_arm)
    argv = [f"--study={path}", f"--out={out}", "--arms", "pool_75"]
    with pytest.raises(SystemExit):
        compute_matched.main(argv)
    assert made == [("pool_75", 120.0, 0)]
    with pytest.raises(
        ConfigError, match="pool_75 with other fields .*peak is not set and 0.5; .* --out="
    ):
        compute_matched.main([*argv, "--seeds", "1", "--config.optim.lr_peak=0.5"])
    with pytest.raises(ConfigError, match="runs with eval.num 16, and now it is 8 for all arms"):
        compute_matched.main([*argv, "--seeds", "1", "--config.eval.num=8"])
    text = path.read_text()
    path.write_text(text.replace("batch_size = 16, 16", "batch_size = 16, 8"))
    with pytest.raises(ConfigError, match="train.batch_size 16, and now it is 8"):
        compute_matched.main([*argv, "--seeds", "1"])
    assert len(made) == 1
    path.write_text(text)
    with pytest.raises(SystemExit):
        compute_matched.main([*argv, "--config.data.dir=/elsewhere"])  # no row depends on it
    assert len(made) == 2


def test_a_study_that_never_trained_may_be_corrected(tmp_path, monkeypatch):
    path, out = tmp_path / "study.py", tmp_path / "out"
    path.write_text(textwrap.dedent(STUDY))
    monkeypatch.setattr(compute_matched.budget, "measured", lambda *_: pytest.fail("no data"))
    argv = [f"--study={path}", f"--out={out}", "--arms", "pool_75"]
    with pytest.raises(pytest.fail.Exception, match="no data"):
        compute_matched.main(argv)
    path.write_text(path.read_text().replace("batch_size = 16, 16", "batch_size = 16, 8"))
    with pytest.raises(pytest.fail.Exception, match="no data"):
        compute_matched.main(argv)


def test_only_the_steps_count_as_training(tmp_path):
    records = [{"step": s, "loss": 1.0, "step_s": t} for s, t in ((1, 5.0), (20, 0.1), (30, 0.2))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert budget.trained_seconds(tmp_path) == pytest.approx(5.0 + 19 * 0.1 + 10 * 0.2)


STUDY = """
    from configs import pretrain_digits
    from studies import arms

    def get_config():
        config = pretrain_digits.get_config()
        config.model.width, config.model.depth, config.model.num_heads = 32, 3, 2
        config.mask.kind, config.optim.warmup_steps = "none", 0
        config.eval.metrics, config.eval.num, config.sample.steps = ("swd",), 16, 2
        config.sample.batch_size, config.train.batch_size = 16, 16
        config.checkpoint.every_steps = 10**6
        return config

    pooled = {"mask.kind": "block", "mask.block_size": 2, "mask.pool_size": 2,
              "mask.hidden": "pool", "train.batch_size": 32}
    ARMS = {"pool_75": [(1.0, {"phases": ((0.75, pooled), (0.25, {}))})]}
    PIECES = {"all": [arms.Run("pool_75", 16.0, 1)]}
"""


def test_a_piece_is_trained_scored_and_continued(tmp_path, monkeypatch, capsys):
    (tmp_path / "study.py").write_text(textwrap.dedent(STUDY))
    times = {32: 0.5, 16: 0.25}  # seconds of a step, by batch
    monkeypatch.setattr(
        budget, "step_seconds", lambda phase, _: (times[phase.config.train.batch_size], None)
    )
    monkeypatch.setattr(budget, "trained_seconds", lambda workdir: 2.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    out = tmp_path / "out"
    argv = [f"--study={tmp_path / 'study.py'}", f"--out={out}", "--piece=all"]
    with pytest.raises(ConfigError, match="num_heads"):
        compute_matched.main([*argv, "--config.model.num_heads=5"])  # leaves nothing behind

    with lock.one_run(out / "runs" / "pool_75_16s_seed1"):
        compute_matched.main(argv)  # leaves it to the process that has it
    assert not compute_matched.read_rows(out / "rows.csv") and not list((out / "runs").iterdir())

    # Stopped in training, then in scoring: neither is begun again, nor are the steps timed again.
    with monkeypatch.context() as stopping:
        train = functools.partial(compute_matched.train.train, preempted=lambda step: step == 2)
        stopping.setattr(compute_matched.train, "train", lambda config, w, _: train(config, w))
        with pytest.raises(SystemExit, match=str(TRY_AGAIN)):
            compute_matched.main(argv)
    assert checkpoint.steps(out / "runs" / "pool_75_16s_seed1" / "0") == [2]
    monkeypatch.delattr(budget, "step_seconds")
    with monkeypatch.context() as stopping:
        stopping.setattr(compute_matched.evaluate, "evaluate", lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            compute_matched.main(argv)
    assert "resuming from step 2" in capsys.readouterr().out
    assert checkpoint.steps(out / "runs" / "pool_75_16s_seed1" / "0")[-1] == 5
    compute_matched.main(argv)
    assert "step 5 of 5; nothing to do" in capsys.readouterr().out
    (found,) = compute_matched.read_rows(out / "rows.csv")
    first, last = json.loads(found["phases"])
    # 16 device-seconds on 8 devices, of which three quarters for the first phase
    assert (first["steps"], first["batch"], first["tokens"]) == (3, 32, "12")
    assert (last["steps"], last["batch"], last["tokens"]) == (2, 16, "18")
    assert (found["updates"], found["images"], found["seed"]) == ("5", "128", "1")
    assert float(found["trained_s"]) == 16 and float(found["swd"]) > 0
    cost = sum(p["steps"] * p["batch"] * p["gflop_per_image"] for p in (first, last)) / 1e6
    assert float(found["pflop"]) == pytest.approx(cost, rel=1e-3) and cost < 1e-3
    assert found["heldout_loss"] == found["floor"] == ""  # digits have no test split
    assert [path.name for path in (out / "grids").iterdir()] == ["pool_75_16s_seed1.png"]
    assert not list((out / "runs").iterdir())
    page.main([f"--rows={out / 'rows.csv'}", f"--out={out}", f"--grids={out / 'grids'}"])
    text = (out / "page.html").read_text()
    assert "pool_75, 16 s" in text and "Without a picture" not in text
    capsys.readouterr()
    compute_matched.main(argv)  # goes on with what is missing: nothing
    assert "of which 0 are not in" in capsys.readouterr().out
