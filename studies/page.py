"""Plots, tables and one HTML page from the rows of `studies.compute_matched`.

    python -m studies.page --rows=studies/transfer64.csv --out=DIR [--grids=GRIDS]

Scores compare only where they were computed alike, and seconds only on one kind of device, so
rows of several kinds need --device=NAME, as the column has it.

Writes DIR/page.html, which needs no other file, and its pictures. An arm's family is the first word
of its name; "scratch" is what the others are compared with. Needs matplotlib: pip install
'maskdm_jax[demo]'.
"""

import base64
import html
import io
import json
import math
import pathlib
import shlex
import sys

from PIL import Image

from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import TEXT
from maskdm_jax.run import command_line, files
from maskdm_jax.run.progress import say
from studies import plots, points
from studies.arms import Run, difference
from studies.budget import Phase
from studies.compute_matched import damaged, read_rows, run_of
from studies.points import Reached

# What rows that are compared have in common.
_ALIKE = ("n", "steps", "reference_sha256", "network_sha256", "device")
_NAMES = (*Run._fields, "phases", *_ALIKE)  # columns without which there is no page


def factors(found: list[Reached]) -> list[list[str]]:
    """Rows of the table: seconds until the best scratch run's final value, for every other arm."""
    rows = []
    for r in found:
        least, most = ("at least ", "at most ") if r.is_bound else ("", "")
        target = f"{r.value:.4g} ({r.scratch.arm}, {r.scratch.seconds:g} s)"
        spread = " to ".join(f"{factor:.2f}" for factor in r.range or ())
        rows.append([target, r.arm, f"{most}{r.seconds:.0f} s", f"{least}{r.factor:.2f}", spread])
    return rows


def write_page(rows: list[dict], out: pathlib.Path, grids: pathlib.Path | None = None) -> None:
    """Writes page.html and its plots to `out`.

    Args:
      rows: of `studies.compute_matched`; at least one.
      out: a folder that is there.
      grids: where that left its pictures of samples; None for none.
    """
    score = points.main_score(rows)
    found = points.of_rows(rows, score)
    floor = next((float(row["floor"]) for row in rows if row.get("floor")), math.nan)
    better = "Lower" if points.sign(score) > 0 else "Higher"
    budget = points.compared_budget(found)
    best = points.best_of_families(found, budget)
    figures = {
        "arms.png": plots.plot_arms(found, floor, score, points.widest_budget(found)),
        "scores.png": plots.plot_scores(points.outstanding(found), floor, score),
        "seconds.png": plots.plot_seconds(points.reached(found)),
        "noise_levels.png": plots.plot_bins(best),
        "factors.png": plots.plot_factors(points.reached_by_level(found)),
    }
    for name, figure in figures.items():
        (out / name).unlink(missing_ok=True)  # of other rows
        if figure is not None:
            figure.savefig(out / name, dpi=110)
    drawn = [name for name, figure in figures.items() if figure is not None]
    parts = [
        f"<h1>Score at equal cost</h1><p>{_definition(rows, score, floor)}</p><p>{better}"
        f" is better. {_HELP}</p>",
        *(
            f"{_picture((out / name).read_bytes(), 'png', name)}<p>Drawn: {_DRAWN[name]}. The "
            "tables have every arm.</p>"
            for name in drawn
        ),
        "<h2>Seconds until scratch's final score</h2>",
        _reached(["scratch's score", *_REACHED], factors(points.reached(found)), found),
        *_until_loss(found),
        "<h2>Runs</h2>",
        _table(["family", "arms", "runs"], _counts(found)),
    ]
    for seconds in sorted({point.seconds for point in found}):
        shown = [point for point in found if point.seconds == seconds]
        parts += [f"<h2>{seconds:g} device-seconds</h2>", _table(_HEADINGS, map(_cells, shown))]
    for point in best if grids else ():
        title = f"{point.arm}, {budget:g} s"
        paths = sorted(grids.glob(f"{point.arm}_{budget:g}s_seed*.png"))
        shown = _picture(_small(paths[0]), "jpeg", title) if paths else "<p>Without a picture.</p>"
        parts += [f"<h2>{title}</h2>", shown]
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


_HELP = (
    "A score is the mean of its seeds, and ± their standard deviation; held-out "
    "loss and costs are means too. Memorised: the share of samples that are closer to a training "
    "image than the threshold. Trained, set-up and scoring are device-seconds. At most and at "
    "least: an arm's shortest run is already better. Arms that do not reach a score, or only with "
    "a run longer than scratch's of which no shorter one exists, have no line."
)
# Which arms each plot has.
_DRAWN = {
    "arms.png": "the arms with this budget, which most have",
    "scores.png": "the arms with several budgets, and the best of each family at each budget",
    "seconds.png": "the fastest arm of each family",
    "noise_levels.png": "the best arm of each family at this budget",
    "factors.png": "the arms with several budgets that reach scratch's loss at a level",
}
_REACHED = ["arm", "reached in", "factor", "range: two standard errors"]
_HEADINGS = [
    "arm", "score", "seeds", "held-out loss", "memorised", "images, M", "PFLOP", "trained, s",
    "set-up, s", "scoring, s", "phases",
]  # fmt: skip


def _definition(rows, score, floor):
    first = rows[0]
    hashes = {"reference": first["reference_sha256"], "network": first["network_sha256"]}
    return "; ".join(
        [
            f"{score} of {first['n']} samples, {first['steps']} sampler steps",
            *([f"floor {floor:.4g}"] if math.isfinite(floor) else []),
            *(f"{name} {value[:8]}" for name, value in hashes.items() if value),
            ", ".join(sorted({row["device"] for row in rows})),
        ]
    )


def _reached(headings, lines, found):
    if lines:
        return _table(headings, lines)
    if all(point.family != points.BASELINE for point in found):
        return "<p>There is no run of scratch.</p>"
    return "<p>No other arm is shown to reach it in scratch's time.</p>"


def _until_loss(found):
    """Its heading and table, without a range: of a loss the mean over the seeds is kept alone."""
    if all(math.isnan(point.heldout) for point in found):
        return []
    lines = [line[:-1] for line in factors(points.reached(found, points.heldout, points.heldout))]
    title = "<h2>Seconds until scratch's final held-out loss</h2>"
    return [title, _reached(["scratch's loss", *_REACHED[:-1]], lines, found)]


def _known(value, form):
    """A number as text, nothing if it is not known."""
    return "" if math.isnan(value) else format(value, form)


def _cells(point):
    form = ".3f" if abs(point.score) >= 0.01 else ".2g"  # KID is small
    spread = "" if math.isnan(point.deviation) else f" ± {point.deviation:{form}}"
    phases = "; ".join(
        f"{p['steps']:,} x {p['batch']} at {p['tokens']} tokens, {p['step_ms']:.1f} ms"
        for p in point.phases
    )
    return [
        point.arm, f"{point.score:{form}}{spread}", len(point.scores), _known(point.heldout, ".5f"),
        _known(point.memorised, ".2%"), f"{point.images / 1e6:.3f}",
        format(point.pflop, ",.0f" if point.pflop >= 10 else ".3g"),
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


def _picture(content, kind, title):
    data = base64.b64encode(content).decode()
    return f'<p><img alt="{html.escape(title)}" src="data:image/{kind};base64,{data}"></p>'


def _small(path):
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> None:
    example = "python -m studies.page --rows=studies/transfer64.csv --out=DIR"
    parser = command_line.Parser(__doc__, example)
    parser.flag("--rows", TEXT, "CSV of studies.compute_matched", required=True)
    parser.flag("--out", TEXT, "folder for the page and its plots", required=True)
    parser.flag("--arms", TEXT, "take these arms alone", [], many=True)
    parser.flag("--device", TEXT, "take the rows of this one, as the column `device` has it", "")
    parser.flag("--grids", TEXT, "its folder of samples", "")
    args = parser.parse(argv)
    path = files.local_path(args.rows, "--rows")
    rows = _chosen(read_rows(path, _NAMES), path, args.arms, args.device)
    grids = files.local_path(args.grids, "--grids") if args.grids else None
    if grids and not any(grids.glob("*_seed*.png")):
        what = "with no picture of an arm" if grids.is_dir() else "where no folder is"
        raise ConfigError(
            f"--grids is {args.grids}, {what}; expected that of studies.compute_matched; type "
            "--grids=DIR/grids, or leave it out"
        )
    out = files.out_folder(args.out, "--out")
    write_page(rows, out, grids)
    say(str(out / "page.html"))


def _chosen(rows, path, arms, device):
    """The rows of those arms on that device, or all; those that do not compare are refused."""
    if not path.exists():
        raise ConfigError(
            f"--rows is {path}, which is not there; expected the rows.csv of "
            "studies.compute_matched; type --rows=studies/transfer64.csv"
        )
    if not rows:
        raise ConfigError(
            f"--rows {path} holds no rows of arms; expected the rows.csv of "
            "studies.compute_matched; type --rows=studies/transfer64.csv"
        )
    for flag, name, given in (("--arms", "arm", arms), ("--device", "device", [device])):
        given = [value for value in given if value]
        there = list(dict.fromkeys(row[name] for row in rows))
        if unknown := [value for value in given if value not in there]:
            of_arms = f" of {', '.join(arms)}" if name == "device" and arms else ""
            raise ConfigError(
                f"{flag} has {unknown[0]!r}, of which {path} has no row{of_arms}; expected "
                f"{', '.join(there)}; type {flag} {shlex.quote(there[0])}"
            )
        rows = [row for row in rows if not given or row[name] in given]
    for name in _ALIKE:
        values = list(dict.fromkeys(row[name] for row in rows))
        if len(values) > 1:
            mend = (
                f"--device={shlex.quote(values[0])}"
                if name == "device"
                else f"--rows=FILE with those of {values[0]} alone"
            )
            raise ConfigError(
                f"--rows {path} has rows that do not compare: their {name} is "
                f"{' or '.join(values)}; expected one alone; type {mend}"
            )
    _check_arms(rows, path)
    return rows


def _check_arms(rows, path):
    """Refuses cells that are not numbers, an arm with two settings, and a seed given twice."""
    score, settings, seeds = points.main_score(rows), {}, set()
    for row in rows:
        try:
            run = run_of(row)
            for name, cell in row.items():
                if name in points.NUMBERS or name.startswith("memorisation"):
                    float(cell or 0)
            float(row[score])
            fields = json.loads(row.get("fields") or "[]")
            fields = [(share, dict(changes)) for share, changes in fields]
            for phase in json.loads(row["phases"]):
                Phase(**phase)
        except (ValueError, TypeError) as error:
            raise damaged(path, row, error) from error
        if differ := difference(settings.setdefault(row["arm"], fields), fields):
            raise ConfigError(
                f"--rows {path} has rows of {row['arm']} with other fields: {differ}; expected one "
                "setting for each arm; give one another name there, then type the same command"
            )
        if run in seeds:
            raise ConfigError(
                f"--rows {path} has {run.arm}, {run.seconds:g} s, seed {run.seed} twice; expected "
                "each seed once; remove one of them, then type the same command"
            )
        seeds.add(run)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
