"""Which parameter of one network becomes which of another: the plan of a start from other weights,
and of a new phase.

Every parameter of either network has a row: it is restored, resized by a rule of `resize`, left out
(it has no place in the new network) or fresh. Whatever no rule covers is a problem, which the
caller reports.
"""

import collections
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from maskdm_jax.weights import resize
from maskdm_jax.weights.resize import Geometry

POOLED = "pooled/"  # the parameters of `model.pooling`
_CLASSES = "class_embed/"
_BLOCK = re.compile(r"(in|mid|out)_block(_\d+)?(?=/)")


class Row(NamedTuple):
    """What becomes of one parameter.

    Fields:
      name: in the new network; of what is left out, in the old one.
      outcome: "restored", "resized", "left out" or "fresh".
      source: its name in the old network; "" if it is not there.
      there: shape in the old network; None if it is not there.
      here: shape in the new network; None if it is left out.
      why: the rule or the field that decided.
    """

    name: str
    outcome: str
    source: str = ""
    there: tuple[int, ...] | None = None
    here: tuple[int, ...] | None = None
    why: str = ""


class Table(NamedTuple):
    """The plan of a start: a row for each parameter, and a phrase for where they come from."""

    source: str
    rows: list[Row]

    def count(self, outcome: str) -> int:
        """Parameters with that outcome."""
        return sum(row.outcome == outcome for row in self.rows)

    def text(self, every: bool = False) -> str:
        """The table, for a terminal: a row for each group of parameters that fare alike, such as
        those of all blocks with one name, or `every` row."""
        outcomes = ("restored", "resized", "left out", "fresh")
        totals = ", ".join(f"{self.count(o)} {o}" for o in outcomes if self.count(o))
        cells = [_cells(row) for row in self.rows] if every else _grouped(self.rows)
        widths = [max(map(len, column)) for column in list(zip(*cells, strict=True))[:-1]]
        lines = [f"weights from {self.source}: {totals}"]
        for *row, why in cells:
            padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(["", *padded, why]).rstrip())
        return "\n".join(lines)


def _cells(row):
    shapes = [str(list(shape)) for shape in (row.there, row.here) if shape is not None]
    shape = shapes[0] if len(set(shapes)) == 1 else " -> ".join(shapes)
    is_moved = row.outcome in ("restored", "resized") and row.source != row.name
    moved = f"from {row.source}" if is_moved else ""
    return row.name, row.outcome, shape, "; ".join(filter(None, (row.why, moved)))


def _grouped(rows):
    """Rows of `text`, one for all blocks with the same parameter and the same outcome."""
    groups = collections.Counter()
    for row in rows:
        name = _BLOCK.sub("*_block*", row.name)
        source = name if row.source and _BLOCK.search(row.name) else row.source
        groups[_cells(row._replace(name=name, source=source))] += 1
    return [
        (name, f"{outcome} ({count})" if "*" in name else outcome, shape, why)
        for (name, outcome, shape, why), count in groups.items()
    ]


def by_name(params) -> dict[str, jax.Array]:
    """The leaves of a tree of parameters by name, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def plan(
    theirs: dict[str, jax.Array],
    ours: dict[str, jax.ShapeDtypeStruct],
    old: Geometry,
    new: Geometry,
    blocks: dict[str, str],
    stays_fresh: Callable[[str], str],
    is_ignored: Callable[[str], bool],
) -> tuple[list[Row], dict[str, str]]:
    """The rows, and the problems by name: what no rule covers, in words.

    Args:
      theirs: parameters of the old network by name, such as "mid_block/qkv/kernel"; arrays or
        their shapes.
      ours: those of the new network.
      old, new: the networks' geometries.
      blocks: of theirs for each block of ours that `init.map` names; "-": it stays fresh.
      stays_fresh: name of ours -> the field because of which it starts fresh; "" if none.
      is_ignored: whether one of theirs may be left out.
    """
    rows, problems, used = [], {}, set()
    for name, leaf in ours.items():
        block, slash, part = name.partition("/")
        shape, source = tuple(leaf.shape), blocks.get(block, block) + slash + part
        used.add(source)
        there = tuple(np.shape(theirs[source])) if source in theirs else None
        if why := stays_fresh(name) or ("init.map" if source.startswith("-") else ""):
            rows.append(Row(name, "fresh", source if there else "", there, shape, why))
        elif there is None and name.startswith(_CLASSES) and not old.num_classes:
            rows.append(Row(name, "fresh", here=shape, why="no classes there"))
        elif there is None:
            problems[name] = f"missing {name} {list(shape)}"
        else:
            rule = resize.change(source, old, new)
            if rule is None or _shape_after(source, theirs[source], leaf, old, new) != shape:
                problems[name] = f"{name} has shape {list(there)}, expected {list(shape)}"
            outcome = "resized" if rule else "restored"
            rows.append(Row(name, outcome, source, there, shape, rule or ""))
    has_pooled = any(name.startswith(POOLED) for name in ours)
    for name in theirs:
        if name in used:
            continue
        if name.startswith(POOLED) and not has_pooled:
            why = "no pooled tokens here"
        elif name.startswith(_CLASSES) and not new.num_classes:
            why = "no classes here"
        elif is_ignored(name):
            why = "init.ignore"
        elif blocks and _BLOCK.match(name):
            why = "init.map"
        else:
            problems[name] = f"unexpected {name} {list(np.shape(theirs[name]))}"
            continue
        rows.append(Row(name, "left out", name, tuple(np.shape(theirs[name])), why=why))
    return rows, problems


def _shape_after(name, array, leaf, old, new):
    if name == "position" and np.shape(array)[-1] != leaf.shape[-1]:
        return None  # no rule widens it, and a fresh class row would not fit to it
    return jax.eval_shape(lambda x, y: resize.resized(name, x, old, new, y), array, leaf).shape


def carried(
    rows: Iterable[Row],
    theirs: dict[str, jax.Array],
    fresh: dict[str, jax.Array],
    old: Geometry,
    new: Geometry,
) -> dict[str, jax.Array]:
    """The new network's parameters by name, as the rows have it.

    Args:
      rows: of `plan`.
      theirs: the old network's parameters by name.
      fresh: fresh parameters of the new network; at least those that a row needs.
      old, new: the networks' geometries.
    """
    made = {}
    for row in rows:
        if row.outcome == "fresh":
            made[row.name] = fresh[row.name]
        elif row.outcome != "left out":
            array = theirs[row.source]
            if row.outcome == "resized":
                array = resize.resized(row.source, array, old, new, fresh.get(row.name))
            made[row.name] = array
    return made
