"""How few network evaluations does a sampler need? FID of one trained model for each sampler.

    python -m studies.samplers --workdir=W2 --out=DIR --num=5000 --config.sample.batch_size=500
    python -m studies.samplers --workdir=W2 --out=DIR --solvers ddim:timestep heun:karras \
        --evaluations 10 20 50 --until=540

A solver is SAMPLER:SPACING, or SAMPLER:SPACING:ETA for DDIM that adds noise; with :recompute at the
end, DDIM takes eps from the clipped x0. All start from the same noise. The numbers of evaluations
are without guidance, which doubles them; Heun takes the odd number at or below each. Each pair
gives one row of DIR/samplers.csv: 250 of DDIM's first, then the cheapest. Rows that are there
already are left out, so the same command resumes after a stop; no row is started that is expected
to end after --until. The scores are FID of 768 features against the training images, or as the
config's `eval` fields say. At the end, and with --until=0, it prints the table of all rows.
"""

import itertools
import json
import math
import pathlib
import re
import sys
import time
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import measure
from maskdm_jax import config_file, draw, draw_batches, evaluation, sharding, trained
from maskdm_jax.config import default_config, get
from maskdm_jax.errors import ConfigError
from maskdm_jax.field_table import FIELDS
from maskdm_jax.fields import COUNT, COUNT_OR_0, TEXT, whole
from maskdm_jax.quality import reference
from maskdm_jax.run import command_line, files
from maskdm_jax.run.progress import say
from studies import points
from studies.compute_matched import add_row, read_rows

ROWS = "samplers.csv"
SOLVERS = (
    "ddim:timestep", "ddim:timestep:1", "ddim:timestep:recompute", "ddim:log_snr:recompute",
    "ddpm:timestep", "dpm_solver:timestep", "dpm_solver:log_snr", "dpm_solver:karras",
    "heun:timestep", "heun:log_snr", "heun:karras",
)  # fmt: skip
EVALUATIONS = (5, 10, 15, 20, 30, 50, 100, 250)
BASELINE = ("ddim:timestep", 250)
_RECOMPUTE = ":recompute"
_KEY = ("solver", "budget", "sample", "checkpoint_sha256")  # columns with `Study.key`


class Run(NamedTuple):
    """One row: a solver, and the evaluations that it may take."""

    solver: str
    budget: int

    def fields(self) -> dict:
        """The config's fields for it."""
        given = _values(self.solver)
        steps = (self.budget + 1) // 2 if given["sample.sampler"] == "heun" else self.budget
        return given | {"sample.steps": steps}


def _values(solver):
    """{field: value} of a solver's words, which need not be accepted ones."""
    words = solver.removesuffix(_RECOMPUTE).split(":")
    names = [f"sample.{name}" for name in ("sampler", "spacing", "eta")]
    texts = zip(names, [*words, "0"], strict=False)
    values = {name: FIELDS[name].kind.read(text) for name, text in texts}
    return values | {"sample.recompute_eps": solver.endswith(_RECOMPUTE)}


def runs(solvers: list[str], evaluations: list[int]) -> list[Run]:
    """Each solver with each number, in the order in which they are worth having: what the others
    are compared with, then the cheapest."""
    found = [Run(s, n) for n, s in itertools.product(sorted(evaluations), solvers)]
    return sorted(found, key=lambda run: run != BASELINE)


def check(solvers: list[str]) -> None:
    """Raises ConfigError for the first that is no solver."""
    for solver in solvers:
        values = _values(solver)
        has_words = solver.removesuffix(_RECOMPUTE).count(":") in (1, 2)
        wrong = [name for name, value in values.items() if not FIELDS[name].kind.accepts(value)]
        if has_words and not wrong:
            continue
        right = SOLVERS[0]
        if has_words:
            for name in wrong:
                values[name] = FIELDS[name].kind.nearest(values[name], FIELDS[name].default)
            *words, recomputes = values.values()
            right = ":".join(map(str, words)) + _RECOMPUTE * recomputes
        said = ", ".join(f"{name} is {FIELDS[name].kind.expected}" for name in wrong)
        raise ConfigError(
            f"--solvers has {solver!r}; expected SAMPLER:SPACING or SAMPLER:SPACING:ETA"
            f"{', where ' * bool(said)}{said}; type --solvers {right}"
        )


class Study:
    """A trained model, and what scores its images."""

    def __init__(self, workdir: str, num: int, weights: str, changes: list[str]):
        """Reads the model; `measure_set` comes before the first row.

        Args:
          workdir: a run's, one of its checkpoints, or an official .pt file.
          num: images to score.
          weights: "ema" or "raw".
          changes: "FIELD=VALUE" of the config.
        """
        given = default_config()
        given.eval.update(metrics=("fid",), features=768, heldout_split="")
        for change in changes:
            config_file.set_field(given, change)
        names = {change.partition("=")[0] for change in changes}
        names |= {"eval.metrics", "eval.features", "eval.heldout_split"}
        fields = {name: get(given, name) for name in names} | {"sample.num": num}
        try:
            self._network = trained.read(workdir, None, weights, fields)
        except ConfigError as error:
            said = str(error).replace("load(PATH)", "--workdir=FOLDER")
            said = re.sub(r"fields=\{'([\w.]+)': (\w+)\}", r"--config.\1=\2", said)
            raise ConfigError(said) from error
        self.config = self._network.config
        self._mesh = sharding.make_mesh(self.config)
        self._scorer = evaluation.Evaluation(self.config, self._mesh)

    def measure_set(self) -> None:
        """Measures the set that images are compared with."""
        self._scorer.measure_sets()

    def key(self, run: Run) -> tuple:
        """What two rows of the same figures share, as text."""
        settings = {k: v for k, v in self.config.sample.to_dict().items() if k not in _VARIED}
        return run.solver, str(run.budget), json.dumps(settings), self._network.sha256

    def row(self, run: Run) -> dict:
        """Draws and scores the images of one row."""
        start, config = time.perf_counter(), self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(run.fields())
        by_batch = sharding.batch_sharding(self._mesh)
        drawing = draw.lower_draw(config, self._mesh).compile()
        compiled = time.perf_counter()
        size, num = draw.batch_size(config, self._mesh), config.sample.num
        params = self._network.params
        batches = draw_batches.in_batches(drawing, params, range(num), size, by_batch)
        drawn = np.concatenate([image_BHWC for _, image_BHWC in batches])
        done = time.perf_counter()
        images = reference.Images("the samples", drawn.shape[1:], num, drawn.__getitem__)
        record = self._scorer.of_phase(config).image_scores(images)
        solver, budget, settings, sha256 = self.key(run)
        return {
            "solver": solver,
            "budget": budget,
            **run.fields(),
            "evaluations": draw.evaluations(config),
            **record["scores"],
            "draw_s": round(done - compiled, 2),
            "compile_s": round(compiled - start, 1),
            "scoring_s": round(time.perf_counter() - done, 1),
            "n": num,
            "checkpoint_step": self._network.step,
            "reference_sha256": record["definition"]["reference_sha256"],
            "network_sha256": record["definition"].get("network_sha256", ""),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "date": measure.today(),
            **measure.versions(),
            "sample": settings,
            "checkpoint_sha256": sha256,
        }


# What the rows vary, and fields that no image depends on.
_VARIED = (
    "sampler", "spacing", "steps", "eta", "recompute_eps", "batch_size", "preview_num",
    "preview_steps",
)  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table: solvers by budgets, and what it takes to equal DDIM's 250."""
    score = points.main_score(rows, after="evaluations")
    sign = points.sign(score)
    values = {(row["solver"], int(row["budget"])): float(row[score]) for row in rows}
    budgets = sorted({budget for _, budget in values})
    head = [score, *map(str, budgets), f"reaches {':'.join(map(str, BASELINE))}"]
    lines = [head, ["---"] * len(head)]
    for solver in dict.fromkeys(solver for solver, _ in values):
        found = [values.get((solver, budget)) for budget in budgets]
        enough = [
            str(budget)
            for budget, value in zip(budgets, found, strict=True)
            if value is not None and sign * value <= sign * values.get(BASELINE, math.nan)
        ]
        cells = ["-" if value is None else f"{value:.4g}" for value in found]
        lines.append([solver, *cells, enough[0] if enough else "-"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    example = "python -m studies.samplers --workdir=W2 --out=DIR"
    parser = command_line.Parser(__doc__, example, FIELDS)
    parser.flag("--workdir", TEXT, "a trained run, or an official .pt file", required=True)
    parser.flag("--out", TEXT, "folder for samplers.csv", required=True)
    parser.flag(
        "--solvers", TEXT, "SAMPLER:SPACING[:ETA][:recompute] of each", [*SOLVERS], many=True
    )
    parser.flag("--evaluations", COUNT, "of the network for an image", [*EVALUATIONS], many=True)
    parser.flag("--num", whole(2), "images to score", 5000)
    parser.flag("--weights", *_kind_and_meaning("sample.weights"))
    parser.flag("--until", COUNT_OR_0, "seconds by which the last row is to end", 10**9)
    args = parser.parse(argv)
    check(args.solvers)
    out = files.out_folder(args.out, "--out")
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(out / "xla_cache"))
    path = out / ROWS
    if args.until:
        _run_all(args, path, start)
    if rows := read_rows(path, (*Run._fields, "evaluations")):
        print(table(rows))


def _run_all(args, path: pathlib.Path, start: float) -> None:
    study = Study(args.workdir, args.num, args.weights, args.changes)
    most, steps = max(args.evaluations), study.config.diffusion.num_timesteps
    if study.config.diffusion.framework == "ddpm" and most > steps:
        raise ConfigError(
            f"--evaluations has {most}; expected at most the model's timesteps, {steps}; type "
            f"--evaluations {steps}"
        )
    wanted = runs(args.solvers, args.evaluations)
    done = {tuple(row[name] for name in _KEY) for row in read_rows(path, _KEY)}
    todo = [run for run in wanted if study.key(run) not in done]
    say(f"{len(wanted)} rows, of which {len(todo)} are not in {path} yet")
    if todo:
        study.measure_set()
    each, besides = 0.0, 0.0  # seconds: of one evaluation of all images, and of all else
    for index, run in enumerate(todo):
        begun = time.perf_counter()
        if begun - start + besides + each * run.budget > args.until:
            say(f"no time for {len(todo) - index} rows; the same command goes on with them")
            return
        row = study.row(run)
        add_row(path, row)
        seconds = time.perf_counter() - begun
        each = max(each, row["draw_s"] / run.budget)
        besides = max(besides, seconds - row["draw_s"])
        name = points.main_score([row], after="evaluations")
        score = f"{name} {row[name]:.4g}"
        say(f"{run.solver}, {row['evaluations']} evaluations: {score} ({seconds:.0f} s)")


def _kind_and_meaning(name):
    field = FIELDS[name]
    return field.kind, field.meaning, field.default


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
