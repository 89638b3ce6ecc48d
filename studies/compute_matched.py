"""Trains the arms of a study for equal device-seconds, scores them, and writes one row each.

    python -m studies.compute_matched --study=studies/faces128.py --piece=tune_scratch --out=DIR
    python -m studies.compute_matched --study=studies/faces128.py --arms scratch drop_60 \
        --seconds=300 --seeds 0 1 --out=DIR --config.data.dir=DATA

An arm's budget is its seconds of training, times the devices: all its phases and, if it has several
runs, its pre-training. Each phase's step is timed on this device first, and gets as many steps as
fit in its share. Compilation, saves and scoring are not part of the budget; rows.csv has them
apart. Runs whose rows are in DIR/rows.csv already are left out, and a run that was begun goes on
from its newest checkpoint with the steps that it was given at first, on the same kind of device, so
the same command goes on after a stop. SIGTERM makes a run in training save and stop: `timeout 590
python ...` cuts one that is longer than a machine is lent into pieces. --until is when no further
run is started. The images of DIR/grids come from the same noise.

Processes with the same --out share the runs: each takes the next that no other has. So the GPUs of
one host, with CUDA_VISIBLE_DEVICES=0 for the first process and so on, train as many runs at once.
DIR is then on a file system with locks, as local disks and NFS are.

`studies.page` makes the plots, tables and the page from rows.csv.
"""

import csv
import functools
import json
import math
import pathlib
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable

import jax

from benchmarks import measure
from maskdm_jax import checkpoint, evaluate, evaluation, sharding, train
from maskdm_jax.data import sources
from maskdm_jax.errors import ConfigError
from maskdm_jax.field_table import FIELDS
from maskdm_jax.fields import COUNT, SEED, TEXT, number
from maskdm_jax.heldout import NAMES as BINS
from maskdm_jax.run import command_line, files, lock, preemption
from maskdm_jax.run.progress import say
from studies import arms, budget
from studies.arms import Run

ROWS = "rows.csv"


def run_arm(study, run: Run, changes: list[str], out: pathlib.Path) -> dict:
    """Trains and scores one arm, from where an earlier start was stopped.

    Args:
      study: its module, see `arms.load`.
      run: the arm, budget and seed.
      changes: "FIELD=VALUE" for every run of the study, such as where its data is.
      out: for the run's workdirs, in `run_folder`, and its grid of samples.

    Returns:
      The row. Its seconds of set-up are all those of its starts that are neither training nor the
      last start's scoring.
    """
    arm = arms.with_typed(study, run.arm, changes)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    folder, before = run_folder(out, run), ""
    begun = budget.Begun(folder, {"settings": arm, "device": device})
    cost, trained, steps = [], 0.0, []

    def stop(*_):
        sys.exit(command_line.TRY_AGAIN)

    try:
        configs = arms.configs(study, run.arm, changes)
        for index, ((share, _), config) in enumerate(zip(arm, configs, strict=True)):
            config.seed, config.init.path = run.seed, before
            wall = share * run.seconds / jax.device_count()
            if not begun.phases(index):
                say(f"{run.arm}: timing a step of each phase ...")
                found, steps = budget.measured(config, wall, sources.open_source(config))
                with lock.hold(out):
                    arms.check_settings(study, run.arm, changes, out, keep=True)
                begun.add(found)
            found = begun.phases(index)
            config, workdir = budget.fitted(config, found), folder / str(index)
            with preemption.watched(functools.partial(checkpoint.steps, workdir)) as is_stopped:
                train.train(config, workdir, is_stopped)  # finds `steps` compiled
            # What comes goes on from the run or the images that are there, however it is stopped.
            signal.signal(signal.SIGTERM, stop)
            steps.clear()
            cost, before = cost + found, str(workdir)
            trained += budget.trained_seconds(workdir)
        trained_at = time.perf_counter()
        (record,) = evaluate.evaluate(config, workdir)
        scoring_s = time.perf_counter() - trained_at
    finally:
        if begun.phases(0):  # not of settings that were refused
            begun.keep()
    (out / "grids").mkdir(exist_ok=True)
    shutil.copyfile(
        pathlib.Path(record["images"]) / "grid.png", out / "grids" / f"{folder.name}.png"
    )
    ema, definition = record["heldout_loss"].get("ema"), record["definition"]
    return {
        "arm": run.arm,
        "seconds": run.seconds,
        "seed": run.seed,
        **record["scores"],
        "floor": next(iter(record["floor"]["heldout"].values())) if "floor" in record else "",
        "heldout_loss": ema["mean"] if ema else "",
        "heldout_loss_raw": record["heldout_loss"]["raw"]["mean"] if ema else "",
        **{f"loss {name}": ema["bins"][name] if ema else "" for name in BINS},
        "trained_s": round(trained * jax.device_count(), 1),
        "updates": sum(phase.steps for phase in cost),
        "images": sum(phase.steps * phase.batch for phase in cost),
        # Four digits of it, however small: a plot has its logarithm.
        "pflop": f"{sum(p.steps * p.batch * p.gflop_per_image for p in cost) / 1e6:.4g}",
        "set_up_s": round(begun.seconds() - trained - scoring_s, 1),
        "scoring_s": round(scoring_s, 1),
        "phases": json.dumps([phase._asdict() for phase in cost]),
        "fields": json.dumps(arm),
        "n": definition["n"],
        "steps": definition["steps"],
        "reference_sha256": definition["reference_sha256"],
        "network_sha256": definition.get("network_sha256", ""),
        "device": record["device"],
        "date": measure.today(),
        **measure.versions(),
    }


def run_folder(out: pathlib.Path, run: Run) -> pathlib.Path:
    """Where a run's workdirs are until it has its row."""
    return out / "runs" / f"{run.arm}_{run.seconds:g}s_seed{run.seed}"


def read_rows(path: pathlib.Path, names: Iterable[str] = ()) -> list[dict]:
    """The rows of a study, as text; none if there is no such file.

    Args:
      path: a CSV.
      names: columns that it must have.

    Raises:
      ConfigError: for a file that is no CSV or lacks a column, and for a row that is cut off.
    """
    if not path.exists():
        return []
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            there = reader.fieldnames or names  # a program stopped before it wrote them
            if lacking := [name for name in names if name not in there]:
                raise ConfigError(
                    f"{path} holds no rows of a study: its first line has no {', '.join(lacking)}; "
                    "expected the CSV of a study's program; type another path, or move it away"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error("not as many values as names")
                rows.append(row)
    except csv.Error as error:
        raise ConfigError(
            f"{path}: the row after {len(rows)} others has {error}; expected rows as "
            "studies.compute_matched writes them; remove it, then type the same command"
        ) from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is no text file ({error}); expected the rows.csv of studies.compute_matched; "
            "type another path"
        ) from error
    return rows


def run_of(row: dict) -> Run:
    """The run of a row.

    Raises:
      ValueError: for a cell that no run has.
    """
    run = Run(row["arm"], float(row["seconds"]), int(row["seed"]))
    if not 0 < run.seconds < math.inf:
        raise ValueError(f"{run.seconds:g} seconds")
    return run


def damaged(path: pathlib.Path, row: dict, error: Exception) -> ConfigError:
    """The refusal of a row with such a cell."""
    return ConfigError(
        f"{path}: a row of {row['arm']} has a number or JSON that is damaged ({error}); expected "
        "rows as studies.compute_matched writes them; correct it, then type the same command"
    )


def add_row(path: pathlib.Path, row: dict) -> None:
    """Appends a row; one with other columns is refused."""
    rows = read_rows(path)
    if rows and list(rows[0]) != list(row):
        old, new = (shlex.quote(str(p)) for p in (path, path.with_suffix(".old.csv")))
        differ = ", ".join(sorted(set(rows[0]) ^ set(row))) or "another order"
        raise ConfigError(
            f"{path} has other columns than this run's row: {differ}; type mv {old} {new}, and the "
            "same command then adds the row without training again"
        )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if not rows:
            writer.writeheader()
        writer.writerow(row)


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    example = (
        "python -m studies.compute_matched --study=studies/faces128.py --arms scratch --out=DIR"
    )
    parser = command_line.Parser(__doc__, example, FIELDS)
    parser.flag("--study", TEXT, "the study's Python file", required=True)
    parser.flag("--out", TEXT, "folder for rows.csv, grids and the runs", required=True)
    parser.flag("--piece", TEXT, "a list of runs of the study", "")
    parser.flag("--arms", TEXT, "or these arms", [], many=True)
    parser.flag(
        "--seconds", number(1), f"their device-seconds of training; without it {arms.SECONDS:g}"
    )
    parser.flag("--seeds", SEED, f"their seeds; without it {arms.SEED}", [], many=True)
    parser.flag("--until", COUNT, "seconds after which no run is started", 10**9)
    args = parser.parse(argv)
    study = arms.load(args.study)
    wanted = arms.chosen(study, args.piece, args.arms, args.seconds, args.seeds)
    for arm in dict.fromkeys(run.arm for run in wanted):
        arms.configs(study, arm, args.changes)  # refused before another trains
    out = files.out_folder(args.out, "--out")
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(out / "xla_cache"))
    todo = [run for run in wanted if not _is_done(study, run, args.changes, out)]
    say(f"{len(wanted)} runs, of which {len(todo)} are not in {out / ROWS} yet")
    if todo:
        _check_scoring(arms.configs(study, todo[0].arm, args.changes)[-1])
    last = 0.0
    for run in todo:
        begun = time.perf_counter()
        if _is_done(study, run, args.changes, out):
            continue
        if begun - start + last > args.until:
            say(f"no time to begin {run.arm} or another run; the same command resumes")
            return
        if _run_once(study, run, args.changes, out):
            last = time.perf_counter() - begun


def _check_scoring(config) -> None:
    """Refuses sets and weights that cannot give the scores, before an arm has trained."""
    config = config.copy_and_resolve_references()
    config.sample.num = config.eval.num
    evaluation.Evaluation(config, sharding.make_mesh(config))


def _run_once(study, run, changes, out) -> bool:
    """Trains, scores and adds the row of a run, unless another process of this --out has it."""
    begun, folder = time.perf_counter(), run_folder(out, run)
    done = folder.with_name(f".{folder.name}")
    try:
        with lock.one_run(folder, wait_s=0):
            if _is_done(study, run, changes, out):
                return False
            row = run_arm(study, run, changes, out)
            with lock.hold(out):
                add_row(out / ROWS, row)
            # A folder that another process looks into cannot be removed.
            shutil.rmtree(done, ignore_errors=True)
            folder.rename(done)
        shutil.rmtree(done)
    except lock.InUse:
        say(f"another process has {run.arm}, {run.seconds:g} s, seed {run.seed}")
        return False
    name = list(row)[3]  # the first score
    seconds = time.perf_counter() - begun
    say(f"{run.arm}, {run.seconds:g} s, seed {run.seed}: {name} {row[name]:.4g} in {seconds:.0f} s")
    return True


def _is_done(study, run, changes, out) -> bool:
    """Whether rows.csv has the run; with other fields than the run begins with, it is refused."""
    with lock.hold(out):  # others add rows
        rows = read_rows(out / ROWS, Run._fields)
        arms.check_settings(study, run.arm, changes, out, keep=False)
    for row in rows:
        try:
            if run_of(row) == run:
                return True
        except ValueError as error:
            raise damaged(out / ROWS, row, error) from error
    return False


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
