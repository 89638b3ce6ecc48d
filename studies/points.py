"""A study's rows as points: an arm at one budget, and what it reaches when.

An arm's family is the first word of its name.
"""

import collections
import json
import math
import operator
import re
import statistics
from collections.abc import Callable
from typing import NamedTuple

from maskdm_jax.heldout import NAMES as BINS
from maskdm_jax.quality.measure import HIGHER_IS_BETTER

NUMBERS = (  # columns with a number, or nothing
    "heldout_loss", "trained_s", "images", "pflop", "set_up_s", "scoring_s", "floor",
    *(f"loss {name}" for name in BINS),
)  # fmt: skip
BASELINE = "scratch"  # the family that the others are compared with


def _family(arm):
    return arm.partition("_")[0]


class Point(NamedTuple):
    """An arm at one budget: what its seeds have in common, and their scores."""

    arm: str
    seconds: float
    scores: list[float]  # by seed
    sign: int  # of a score times this, lower is better
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

    @property
    def rank(self) -> float:
        return self.sign * self.score

    @property
    def deviation(self) -> float:
        """The standard deviation of the scores; nan with one seed, or if one is not finite."""
        if len(self.scores) == 1 or not math.isfinite(self.score):
            return math.nan
        return statistics.stdev(self.scores)

    @property
    def error(self) -> float:
        """The standard error of the score over its size; nan with one seed, or if it is 0."""
        return self.deviation / math.sqrt(len(self.scores)) / (abs(self.score) or math.nan)


def main_score(rows: list[dict], after: str = "seed") -> str:
    """The score that rows are ranked by: FID if there is one, else the column after `after`."""
    names = list(rows[0])
    return next((name for name in names if name.startswith("fid")), names[names.index(after) + 1])


def sign(score: str) -> int:
    """-1 for a score of which higher is better, 1 for the others."""
    return -1 if re.sub(r"\d*$", "", score) in HIGHER_IS_BETTER else 1


def of_rows(rows: list[dict], score: str) -> list[Point]:
    """The rows by arm and budget, best score first; scores that are not numbers come last."""
    groups = {}
    for row in rows:
        groups.setdefault((row["arm"], float(row["seconds"])), []).append(row)

    def mean(group, name):
        values = [float(row[name]) for row in group if row.get(name)]
        return statistics.mean(values) if values else math.nan

    share = next((name for name in rows[0] if name.startswith("memorisation_share")), "")
    found = [
        Point(
            arm,
            seconds,
            [float(row[score]) for row in group],
            sign(score),
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
    return sorted(found, key=lambda point: (math.isnan(point.rank), point.rank))


Value = Callable[[Point], float]  # of a point: the lower, the better
_rank, heldout = operator.attrgetter("rank"), operator.attrgetter("heldout")


def seconds_to(arm: list[Point], target: float, value: Value = _rank) -> tuple[float, bool] | None:
    """When an arm reaches a value: (seconds, whether it is an upper bound); None if it does not.

    Between two budgets, log(value) is interpolated over log(seconds), or the value itself where it
    changes its sign, as KID may. Each budget is a run of its own, with its own decay of the
    learning rate; a long run's beginning does not count.
    """
    curve = sorted((point.seconds, value(point)) for point in arm)
    first = next((i for i, (_, found) in enumerate(curve) if found <= target), None)
    if first is None:
        return None
    if first == 0:
        return curve[0][0], True
    (start, before), (end, after) = curve[first - 1 : first + 1]
    if before * after > 0 and before * target > 0:
        share = math.log(before / target) / math.log(before / after)
    else:
        share = (before - target) / (before - after)
    return start * (end / start) ** share, False


def factor_range(arm: list[Point], scratch: Point) -> tuple[float, float] | None:
    """The factors if an arm's score and scratch's differed by two standard errors more, and less.

    The errors are those of scratch's seeds and of the arm's at the budget closest to where it
    reaches scratch's score. None where either has one seed there, or where an end of the range is
    not between two of the arm's budgets.
    """
    when = seconds_to(arm, scratch.rank)
    if when is None:
        return None
    nearest = min(arm, key=lambda point: abs(math.log(point.seconds / when[0])))
    error = 2 * math.hypot(nearest.error, scratch.error)
    if math.isnan(error):
        return None
    error *= abs(scratch.rank)
    ends = [seconds_to(arm, scratch.rank + change) for change in (-error, error)]
    if any(end is None or end[1] for end in ends):
        return None
    return tuple(scratch.seconds / seconds for seconds, _ in ends)


class Reached(NamedTuple):
    """When an arm reaches the value that scratch's best run of a budget has, see `seconds_to`."""

    arm: str
    scratch: Point
    value: float
    seconds: float
    is_bound: bool
    range: tuple[float, float] | None = None  # of `factor_range`

    @property
    def family(self) -> str:
        return _family(self.arm)

    @property
    def factor(self) -> float:
        return self.scratch.seconds / self.seconds


def reached(found: list[Point], value: Value = _rank, rank: Value = _rank) -> list[Reached]:
    """Where every other arm reaches the value of scratch's best run at each budget, by `rank`.

    Budgets at which scratch is behind a shorter run of it are left out, and so are arms of which
    only longer runs exist.
    """
    found = [p for p in found if math.isfinite(value(p)) and math.isfinite(rank(p))]
    results, arms = [], by_arm(found)
    for budget in sorted({point.seconds for point in found if point.family == BASELINE}):
        runs = [p for p in found if p.family == BASELINE and p.seconds <= budget]
        best = min(runs, key=rank)
        if best.seconds < budget:
            continue  # tuned less than the shorter one
        for arm, of_arm in arms.items():
            if of_arm[0].family == BASELINE:
                continue
            when = seconds_to(of_arm, value(best), value)
            if when and (when[0] <= best.seconds or not when[1]):
                is_score = value is _rank
                spread = factor_range(of_arm, best) if is_score else None
                shown = best.score if is_score else value(best)
                results.append(Reached(arm, best, shown, *when, spread))
    return results


def reached_by_level(found: list[Point]) -> dict[tuple[str, float], list[Reached | None]]:
    """Where the arms with several budgets reach the held-out losses by level of scratch's runs, of
    each budget's run whose mean loss is the lowest.

    Returns:
      {(arm, scratch's seconds): one for each of `heldout.NAMES`; None where it does not}.
    """
    levels = {}
    several = [point for point in found if point.family == BASELINE or _is_repeated(found, point)]
    for index in range(len(BINS)):
        for r in reached(several, lambda point, index=index: point.bins[index], heldout):
            of_line = levels.setdefault((r.arm, r.scratch.seconds), [None] * len(BINS))
            of_line[index] = r
    return levels


def by_arm(found: list) -> dict[str, list]:
    """The points of each arm, in the order in which they are found."""
    arms = {}
    for point in found:
        arms.setdefault(point.arm, []).append(point)
    return arms


def best_of_families(found: list[Point], seconds: float) -> list[Point]:
    """The best arm of each family at a budget."""
    best = {}
    for point in found:  # best score first
        if point.seconds == seconds:
            best.setdefault(point.family, point)
    return list(best.values())


def outstanding(found: list[Point]) -> list[Point]:
    """The points of the arms that were run at several budgets or are the best of their family."""
    best = [best_of_families(found, seconds) for seconds in {point.seconds for point in found}]
    kept = {point.arm for of_budget in best for point in of_budget}
    return [point for point in found if point.arm in kept or _is_repeated(found, point)]


def _is_repeated(found, point):
    """Whether the arm of a point was run at several budgets."""
    return sum(other.arm == point.arm for other in found) > 1


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
