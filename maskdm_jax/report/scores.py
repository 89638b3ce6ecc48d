"""Scores, one table for each definition."""

import pathlib

from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import measure
from maskdm_jax.report import commands, runs
from maskdm_jax.report.markup import element, table
from maskdm_jax.report.summary import named
from maskdm_jax.run.telemetry import described_definition, described_floor


def section(found: list[runs.Run], configs: dict) -> list:
    """Scores of the same definition share a table, others never."""
    parts = []
    for number, rows in enumerate(_by_definition(found), 1):
        definition = rows[0][1]["definition"]
        whole = element(
            "details",
            element("summary", "The whole definition"),
            table(["entry", "value"], [[k, str(v)] for k, v in definition.items()]),
        )
        notes = dict.fromkeys(note for run, record in rows for note in _notes(run, record))
        parts += [
            element("h3", f"Definition {number}", id=f"definition-{number}"),
            _table(rows, found),
            element("p", described_definition(definition), class_="soft"),
            [element("p", note, class_="soft") for note in notes],
            whole,
        ]
    for run in found:
        if run.scores:
            continue
        if run.is_masked:
            text = f"{run.name} has no scores: {commands.MASKED}"
            parts.append(element("p", text, class_="missing"))
        else:
            command = commands.mode(run, configs, "evaluate")
            parts.append(commands.missing(f"{run.name} has no scores", command))
    return parts


def of_samples(drawn: runs.Samples, run: runs.Run, found: list[runs.Run]) -> list:
    """The scores of a folder of samples, each with a link to its definition."""
    parts = []
    for number, rows in enumerate(_by_definition(found), 1):
        for scored, record in rows:
            if (
                scored is not run
                or pathlib.Path(record.get("images", "")).name != drawn.folder.name
            ):
                continue
            values = ", ".join(f"{name} {value:.4g}" for name, value in record["scores"].items())
            count = record["definition"]["n"]
            link = element("a", f"definition {number}", href=f"#definition-{number}")
            parts += [f"Of {count:,} samples: {values} (", link, "). "]
    return parts


def _by_definition(found):
    """[(run, record)] of each definition."""
    groups = []
    for run in found:
        for record in sorted(run.scores, key=lambda r: r["step"]):
            group = next((g for g in groups if _same(g[0][1], record)), None)
            if group is None:
                groups.append([(run, record)])
            else:
                group.append((run, record))
    return groups


def _same(a, b):
    try:
        measure.check_same_definition([a, b])
    except ConfigError:
        return False
    return True


def _table(rows, found):
    names = list(dict.fromkeys(name for _, record in rows for name in record["scores"]))
    weights = list(dict.fromkeys(name for _, record in rows for name in record["heldout_loss"]))
    head = ["run", "step", "evaluations", *names, *[f"held-out loss ({name})" for name in weights]]
    body = []
    for run, record in rows:
        values = [_number(record["scores"].get(name), "{:.4g}") for name in names]
        means = [record["heldout_loss"].get(name, {}).get("mean") for name in weights]
        values += [_number(mean, "{:.5f}") for mean in means]
        cost = str(record.get("evaluations", "-"))  # earlier versions wrote none
        body.append([named(run, found), f"{record['step']:,}", cost, *values])
    return table(head, body)


def _notes(run, record):
    if floor := described_floor(record):
        yield f"{run.name}, step {record['step']:,}: {floor}."
    yield from record.get("warnings", [])


def _number(value, form):
    return "-" if value is None else form.format(value)
