"""Plots, tables and one HTML page from the rows of `studies.compute_matched`.

    python -m studies.page --rows=studies/faces128.csv --out=DIR [--grids=GRIDS]

Writes DIR/page.html, which needs no other file, and its pictures. An arm's family is the first word
of its name; "scratch" is what the others are compared with. Needs matplotlib: pip install
'maskdm_jax[demo]'.
"""

import base64
import collections
import html
import io
import json
import math
import pathlib
import statistics
import sys
from typing import NamedTuple

from PIL import Image

from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import TEXT
from maskdm_jax.heldout import NAMES as BINS
from maskdm_jax.run import command_line, files
from studies.compute_matched import read_rows
from studies.plots import BASELINE, by_arm, plot_arms, plot_bins, plot_scores, plot_seconds


def _family(arm):
    return arm.partition("_")[0]


class Point(NamedTuple):
    """An arm at one budget: what its seeds have in common, and their scores."""

    arm: str
    seconds: float
    scores: list[float]  # by seed
    heldout: float  # means over the seeds
    bins: list[float]
    memorised: float
    images: float
    pflop: float
    trained_s: float
    set_up_s: float
    scoring_s: float
    phases: list[dict]

    @property
    def family(self) -> str:
        return _family(self.arm)

    @property
    def score(self) -> float:
        return statistics.mean(self.scores)


def main_score(rows: list[dict]) -> str:
    """The score that arms are ranked by: FID if there is one, else the first."""
    names = list(rows[0])
    return next((name for name in names if name.startswith("fid")), names[names.index("seed") + 1])


def points(rows: list[dict], score: str) -> list[Point]:
    """The rows by arm and budget, best score first."""
    groups = {}
    for row in rows:
        groups.setdefault((row["arm"], float(row["seconds"])), []).append(row)

    def mean(group, name):
        values = [float(row[name]) for row in group if row.get(name)]
        return statistics.mean(values) if values else math.nan

    share = f"memorisation_share{score.removeprefix('fid')}"
    found = [
        Point(
            arm,
            seconds,
            [float(row[score]) for row in group],
            mean(group, "heldout_loss"),
            [mean(group, f"loss {name}") for name in BINS],
            mean(group, share),
            mean(group, "images"),
            mean(group, "pflop"),
            mean(group, "trained_s"),
            mean(group, "set_up_s"),
            mean(group, "scoring_s"),
            json.loads(group[0]["phases"]),
        )
        for (arm, seconds), group in groups.items()
    ]
    return sorted(found, key=lambda point: point.score)


def seconds_to(arm: list[Point], score: float) -> tuple[float, bool] | None:
    """When an arm reaches a score: (seconds, whether it is an upper bound); None if it does not.

    Between two budgets, log(score) is interpolated over log(seconds). Each budget is a run of its
    own, with its own decay of the learning rate; a long run's beginning does not count.
    """
    arm = sorted(arm, key=lambda point: point.seconds)
    reached = next((i for i, point in enumerate(arm) if point.score <= score), None)
    if reached is None:
        return None
    if reached == 0:
        return arm[0].seconds, True
    before, after = arm[reached - 1], arm[reached]
    share = math.log(before.score / score) / math.log(before.score / after.score)
    return before.seconds * (after.seconds / before.seconds) ** share, False


class Reached(NamedTuple):
    """When an arm reaches the best score that scratch has at a budget, see `seconds_to`."""

    arm: str
    scratch: Point
    seconds: float
    is_bound: bool

    @property
    def family(self) -> str:
        return _family(self.arm)


def reached(found: list[Point]) -> list[Reached]:
    """Where every other arm reaches scratch's best scores; not budgets at which it has no best."""
    results, arms = [], by_arm(found)
    for budget in sorted({point.seconds for point in found if point.family == BASELINE}):
        best = next(p for p in found if p.family == BASELINE and p.seconds <= budget)
        if best.seconds < budget:
            continue  # tuned less than the shorter one
        for arm, of_arm in arms.items():
            if of_arm[0].family == BASELINE:
                continue
            if when := seconds_to(of_arm, best.score):
                results.append(Reached(arm, best, *when))
    return results


def factors(found: list[Reached]) -> list[list[str]]:
    """Rows of the table: seconds until the best scratch run's final score, for every other arm."""
    rows = []
    for arm, scratch, seconds, is_bound in found:
        least, most = ("at least ", "at most ") if is_bound else ("", "")
        target = f"{scratch.score:.3f} ({scratch.arm}, {scratch.seconds:g} s)"
        factor = f"{least}{scratch.seconds / seconds:.2f}"
        rows.append([target, arm, f"{most}{seconds:.0f} s", factor])
    return rows


def best_of_families(found: list[Point], seconds: float) -> list[Point]:
    """The best arm of each family at a budget."""
    best = {}
    for point in found:  # best score first
        if point.seconds == seconds:
            best.setdefault(point.family, point)
    return list(best.values())


def outstanding(found: list[Point]) -> list[Point]:
    """The points of the arms that were run at several budgets or are the best of their family."""
    budgets = collections.Counter(point.arm for point in found)
    best = [best_of_families(found, seconds) for seconds in {point.seconds for point in found}]
    kept = {point.arm for of_budget in best for point in of_budget}
    return [point for point in found if budgets[point.arm] > 1 or point.arm in kept]


def compared_budget(found: list[Point]) -> float:
    """The longest budget at which scratch and another family were run; else the longest."""
    families = {}
    for point in found:
        families.setdefault(point.seconds, set()).add(point.family)
    shared = [s for s, names in families.items() if len(names) > 1 and BASELINE in names]
    return max(shared or families)


def widest_budget(found: list[Point]) -> float:
    """The budget at which most arms were run; of two, the longer."""
    arms = collections.Counter(point.seconds for point in found)
    return max(arms, key=lambda seconds: (arms[seconds], seconds))


def write_page(rows: list[dict], out: pathlib.Path, grids: pathlib.Path | None = None) -> None:
    """Writes page.html and its plots to `out`.

    Args:
      rows: of `studies.compute_matched`; at least one.
      out: a folder.
      grids: where that left its pictures of samples; None for none.
    """
    score = main_score(rows)
    found = points(rows, score)
    floor = next((float(row["floor"]) for row in rows if row["floor"]), math.nan)
    out.mkdir(parents=True, exist_ok=True)
    budget = compared_budget(found)
    best = best_of_families(found, budget)
    figures = {
        "arms.png": plot_arms(found, floor, score, widest_budget(found)),
        "scores.png": plot_scores(outstanding(found), floor, score),
        "seconds.png": plot_seconds(reached(found)),
        "noise_levels.png": plot_bins(best),
    }
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(out / name, dpi=110)
    drawn = {name for name, figure in figures.items() if figure is not None}
    first = rows[0]
    parts = [
        f"<h1>Score at equal cost</h1><p>{score} of {first['n']} samples, {first['steps']} sampler "
        f"steps; floor {floor:.4g}; reference {first['reference_sha256'][:8]}, network "
        f"{first['network_sha256'][:8]}; {', '.join(sorted({row['device'] for row in rows}))}.</p>",
        *(_picture((out / name).read_bytes(), "png") for name in figures if name in drawn),
        "<h2>Seconds until scratch's final score</h2>",
        _table(["scratch's score", "arm", "reached in", "factor"], factors(reached(found))),
        "<h2>Runs</h2>",
        _table(["family", "arms", "runs"], _counts(found)),
    ]
    for seconds in sorted({point.seconds for point in found}):
        shown = [point for point in found if point.seconds == seconds]
        parts += [f"<h2>{seconds:g} device-seconds</h2>", _table(_HEADINGS, map(_cells, shown))]
    for point in best if grids else ():
        for path in sorted(grids.glob(f"{point.arm}_{budget:g}s_seed*.png"))[:1]:
            parts += [f"<h2>{point.arm}, {budget:g} s</h2>", _picture(_small(path), "jpeg")]
    style = (
        "body{font:16px sans-serif;max-width:70rem;margin:auto;padding:1rem}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}"
        "td,th{border:1px solid #8888;padding:.2rem .5rem;text-align:left}img{max-width:100%}"
        ":root{color-scheme:light dark}"
    )
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Score at equal cost</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style>'
    )
    files.write_text(out / "page.html", f"{head}{''.join(parts)}</html>\n")


_HEADINGS = [
    "arm", "score", "seeds", "held-out loss", "memorised", "images, M", "PFLOP", "trained, s",
    "set-up, s", "scoring, s", "phases",
]  # fmt: skip


def _cells(point):
    spread = f" ± {statistics.stdev(point.scores):.3f}" if len(point.scores) > 1 else ""
    phases = "; ".join(
        f"{p['steps']:,} x {p['batch']} at {p['tokens']} tokens, {p['step_ms']:.1f} ms"
        for p in point.phases
    )
    return [
        point.arm, f"{point.score:.3f}{spread}", len(point.scores), f"{point.heldout:.5f}",
        f"{point.memorised:.2%}", f"{point.images / 1e6:.3f}", f"{point.pflop:,.0f}",
        f"{point.trained_s:.0f}", f"{point.set_up_s:.0f}", f"{point.scoring_s:.0f}", phases,
    ]  # fmt: skip


def _counts(found):
    for family in dict.fromkeys(point.family for point in found):
        of_family = [point for point in found if point.family == family]
        arms = {point.arm for point in of_family}
        yield [family, len(arms), sum(len(point.scores) for point in of_family)]


def _table(headings, rows):
    lines = ["".join(f"<th>{html.escape(text)}</th>" for text in headings)]
    lines += ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _picture(content, kind):
    return (
        f'<p><img alt="" src="data:image/{kind};base64,{base64.b64encode(content).decode()}"></p>'
    )


def _small(path):
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> None:
    example = "python -m studies.page --rows=studies/faces128.csv --out=DIR"
    parser = command_line.Parser(__doc__, example)
    parser.flag("--rows", TEXT, "CSV of studies.compute_matched", required=True)
    parser.flag("--out", TEXT, "folder for the page and its plots", required=True)
    parser.flag("--grids", TEXT, "its folder of samples", "")
    args = parser.parse(argv)
    path = files.local_path(args.rows, "--rows")
    rows = read_rows(path)
    if not rows or not {"arm", "seconds", "seed", "phases"} <= rows[0].keys():
        raise ConfigError(
            f"--rows {path} holds no rows of arms; expected the rows.csv of "
            "studies.compute_matched; type --rows=studies/faces128.csv"
        )
    grids = files.local_path(args.grids, "--grids") if args.grids else None
    write_page(rows, files.local_path(args.out, "--out"), grids)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
