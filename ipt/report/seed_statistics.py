"""Models of several training seeds: one figure for each, and their difference with an interval over
items and seeds at once.

A score varies for two reasons: the questions are a sample, and so is the training seed. Scores of
all seeds on the same items form a table of seeds by items, and the variance of its mean has two
parts (the crossed random-effects model):

    V_items   the variance of the mean over seeds when items are resampled,
              with n - 1 degrees of freedom
    V_seeds   the variance between the seeds' scores over their number, minus the part of it that
              V_items already contains (the remainder of an item within a seed), and at least 0;
              with seeds - 1 degrees of freedom

The interval's half width is sqrt(t_items^2 V_items + t_seeds^2 V_seeds), each part with its own
quantile of Student's t: exact where one part is alone, and still of about 95% with two seeds, where
Satterthwaite's one number of degrees of freedom for both is too hopeful.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipt.errors import UserError
from ipt.evaluation.metrics.statistics import Metric, standard_error
from ipt.evaluation.results import Results, compare, load_results, paired_metrics
from ipt.report.formatting import finite

Floats = NDArray[np.float64]
SMALLEST_P = 1e-12


@dataclass(frozen=True)
class Table:
    """One score of several seeds: what each has, and what each item adds to it."""

    values: Floats  # (seeds,)
    influences: Floats  # (seeds, items)

    @classmethod
    def of(cls, metrics: Sequence[Metric]) -> "Table":
        return cls(
            np.array([metric.value for metric in metrics]),
            np.array([metric.influence for metric in metrics]),
        )

    def minus(self, other: "Table") -> "Table":
        """Seed by seed; a table of one row is taken from every seed."""
        return Table(self.values - other.values, self.influences - other.influences)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval and the two-sided p of its being zero."""

    value: float
    stderr: float
    low: float
    high: float
    p: float


def compare_seeds(
    ours: Mapping[int, Path], theirs: Mapping[int, Path], task: str, fixed: bool = False
) -> dict[str, dict[str, Any]]:
    """`ours` minus `theirs` (seed -> folder of a finished evaluation): metric -> difference,
    stderr, ci95, p, n.

    Where both have the same seeds these are paired too; else the seeds of both are independent,
    with one spread in common. `fixed`: one of the two is a single model that no seed has a part in
    (the start). Raises UserError where items cannot be paired.
    """
    seeds, others = sorted(ours), sorted(theirs)
    metrics = paired_metrics(
        task, [*(ours[seed] for seed in seeds), *(theirs[seed] for seed in others)]
    )
    compared = {}
    for name in metrics[0]:
        found = [metric[name] for metric in metrics if name in metric]
        if len(found) == len(metrics) and all(math.isfinite(metric.value) for metric in found):
            mine, base = Table.of(found[: len(seeds)]), Table.of(found[len(seeds) :])
            interval = difference_of(mine, base, paired=fixed or seeds == others)
            compared[name] = _entry(interval, found[0].n)
    return compared


def compare_within_seeds(
    ours: Mapping[int, Path], theirs: Mapping[int, Path], task: str
) -> dict[str, dict[str, Any]]:
    """As `compare_seeds` where each seed has items of its own: differences paired within a seed,
    whose spread covers items too.

    Raises UserError if the two have fewer than two seeds in common, or cannot be paired within one.
    """
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        raise UserError(
            f"task {task}: each seed has items of its own, and there are not two seeds in common"
        )
    found = [compare(ours[seed], theirs[seed])[task] for seed in common]
    compared = {}
    for name in found[0]:
        values = np.array([entries[name]["difference"] for entries in found])
        interval = student(
            float(values.mean()), [(float(values.var(ddof=1)) / len(values), len(values) - 1)]
        )
        compared[name] = _entry(interval, sum(entries[name]["n"] for entries in found))
    return compared


def difference_of(ours: Table, theirs: Table, paired: bool) -> Interval:
    """Mean over seeds of `ours` minus that of `theirs`, with `paired` row by row, where one row
    goes with each of the other's.
    """
    return (
        _estimate([ours.minus(theirs)], [1.0]) if paired else _estimate([ours, theirs], [1.0, -1.0])
    )


def with_spread(entry: Mapping[str, Any]) -> Interval | None:
    """The interval of an entry of results over items and, where it has a spread over seeds, those:
    with all of V_seeds, so a little wide.

    None for an entry without a standard error.
    """
    stderr, spread, runs = (
        finite(entry.get("stderr")),
        finite(entry.get("spread")),
        entry.get("runs", 1),
    )
    value = finite(entry.get("value"))
    if value is None or stderr is None:
        return None
    of_items, of_seeds = stderr**2, (spread or 0.0) ** 2 / runs
    return student(value, [(of_items, math.inf), (of_seeds, runs - 1)])


def plain_average(folders: Sequence[Path]) -> Results:
    """As `ipt.evaluation.results.average` where the seeds' items are not the same: the spread over
    seeds covers items too.
    """
    results = [load_results(folder) for folder in folders]
    averaged: Results = {}
    for task in [task for task in results[0] if all(task in result for result in results)]:
        for metric in results[0][task]:
            values = [finite(result[task].get(metric, {}).get("value")) for result in results]
            known = [value for value in values if value is not None]
            if len(known) == len(results):
                spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
                n = sum(result[task][metric]["n"] for result in results)
                entry = {
                    "value": float(np.mean(known)),
                    "stderr": None,
                    "ci95": [None, None],
                    "n": n,
                    "spread": spread,
                    "runs": len(known),
                }
                averaged.setdefault(task, {})[metric] = entry
    return averaged


def student(value: float, parts: Sequence[tuple[float, float]]) -> Interval:
    """The interval and p of a value whose variance is a sum of parts, each with its degrees of
    freedom (infinite: normal).
    """
    from scipy import optimize, stats

    known = [
        (variance, stats.t(freedom) if math.isfinite(freedom) else stats.norm())
        for variance, freedom in parts
        if variance > 0
    ]
    stderr = math.sqrt(sum(variance for variance, _ in parts))

    def half_width(p: float) -> float:
        return math.sqrt(
            sum(variance * float(distribution.isf(p / 2)) ** 2 for variance, distribution in known)
        )

    half = math.nan if math.isnan(stderr) else half_width(0.05)
    if not known or math.isnan(stderr):
        p = float(value == 0) if stderr == 0 else math.nan
    elif half_width(SMALLEST_P) <= abs(value):
        p = SMALLEST_P
    else:
        p = float(optimize.brentq(lambda p: half_width(p) - abs(value), SMALLEST_P, 1.0))
    return Interval(value, stderr, value - half, value + half, p)


def _estimate(tables: Sequence[Table], signs: Sequence[float]) -> Interval:
    """The signed sum of the tables' means; the seeds of all tables share one spread."""
    items = tables[0].influences.shape[1]
    value = sum(
        sign * float(table.values.mean()) for table, sign in zip(tables, signs, strict=True)
    )
    shares = sum(sign * table.influences.mean(0) for table, sign in zip(tables, signs, strict=True))
    of_items = standard_error(np.asarray(shares)) ** 2
    freedom = sum(len(table.values) - 1 for table in tables)
    if freedom == 0:
        return student(value, [(of_items, math.inf)])
    weight = sum(1 / len(table.values) for table in tables) / freedom
    of_seeds = weight * sum(
        float(((table.values - table.values.mean()) ** 2).sum()) for table in tables
    )
    left = sum(
        float(((table.influences - table.influences.mean(0)) ** 2).sum()) for table in tables
    )
    of_both = weight * left / (items * (items - 1)) if items > 1 else 0.0
    return student(value, [(of_items, items - 1), (max(0.0, of_seeds - of_both), freedom)])


def _entry(interval: Interval, n: int) -> dict[str, Any]:
    bounds = [finite(interval.low), finite(interval.high)]
    return {
        "difference": interval.value,
        "stderr": finite(interval.stderr),
        "ci95": bounds,
        "p": finite(interval.p),
        "n": n,
    }
