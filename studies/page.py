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
import math
import operator
import pathlib
import shlex
import statistics
import sys

from PIL import Image

from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import TEXT
from maskdm_jax.run import command_line, files
from studies import plots, points
from studies.compute_matched import read_rows
from studies.points import Reached

# What rows that are compared have in common.
_ALIKE = ("n", "steps", "reference_sha256", "network_sha256", "device")


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
      out: a folder.
      grids: where that left its pictures of samples; None for none.
    """
    score = points.main_score(rows)
    found = points.of_rows(rows, score)
    floor = next((float(row["floor"]) for row in rows if row["floor"]), math.nan)
    out.mkdir(parents=True, exist_ok=True)
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
        _table(["scratch's score", *_REACHED], factors(points.reached(found))),
        "<h2>Seconds until scratch's final held-out loss</h2>",
        _table(
            ["scratch's loss", *_REACHED[:-1]],
            [row[:-1] for row in factors(points.reached(found, *[_heldout] * 2))],
        ),
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


_heldout = operator.attrgetter("heldout")  # without a range: its mean over the seeds is kept alone
_REACHED = ["arm", "reached in", "factor", "range: two standard errors"]
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
    example = "python -m studies.page --rows=studies/transfer64.csv --out=DIR"
    parser = command_line.Parser(__doc__, example)
    parser.flag("--rows", TEXT, "CSV of studies.compute_matched", required=True)
    parser.flag("--out", TEXT, "folder for the page and its plots", required=True)
    parser.flag("--arms", TEXT, "take these arms alone", [], many=True)
    parser.flag("--device", TEXT, "take the rows of this one, as the column `device` has it", "")
    parser.flag("--grids", TEXT, "its folder of samples", "")
    args = parser.parse(argv)
    path = files.local_path(args.rows, "--rows")
    rows = _chosen(read_rows(path), path, args.arms, args.device)
    grids = files.local_path(args.grids, "--grids") if args.grids else None
    write_page(rows, files.local_path(args.out, "--out"), grids)


def _chosen(rows, path, arms, device):
    """The rows of those arms on that device, or all; those that do not compare are refused."""
    if not rows or not {"arm", "seconds", "seed", "phases", *_ALIKE} <= rows[0].keys():
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
    return rows


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
