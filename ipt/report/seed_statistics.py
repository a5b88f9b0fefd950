"""Differences between models with several training seeds, with intervals over items and seeds.

A score varies because the items are a sample, and because the training seed is. The scores of all
seeds on the same items form a table of seeds by items. The variance of its mean has two parts
(crossed random-effects model):

    V_items   the variance of the mean over seeds when items are resampled,
              with n - 1 degrees of freedom
    V_seeds   the variance between the seeds' scores divided by their number, without the part
              that V_items already contains (the residual of an item within a seed), at least 0;
              with seeds - 1 degrees of freedom

The half width of the interval is sqrt(t_items^2 V_items + t_seeds^2 V_seeds), where each part has
its own quantile of Student's t. It is exact if one part is 0. With two seeds it still covers about
95%, while Satterthwaite's approximation, with one number of degrees of freedom for both parts,
covers too little.
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
    """One score of several seeds, and the influence of each item on it."""

    values: Floats  # (seeds,)
    influences: Floats  # (seeds, items)

    @classmethod
    def of(cls, metrics: Sequence[Metric]) -> "Table":
        return cls(
            np.array([metric.value for metric in metrics]),
            np.array([metric.influence for metric in metrics]),
        )

    def minus(self, other: "Table") -> "Table":
        """The difference seed by seed; a table with one row is subtracted from each seed."""
        return Table(self.values - other.values, self.influences - other.influences)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval, and the two-sided p value of zero."""

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

    Seeds are paired if both have the same ones; else they are independent and share one variance.
    `fixed`: one of the two is a single model without a training seed (the base model). Raises
    UserError if items cannot be paired.
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
    """As `compare_seeds` if each seed has its own items: differences are paired within each seed.

    Raises UserError if the two have fewer than two seeds in common, or cannot be paired within one.
    """
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        raise UserError(
            f"task {task}: each seed has its own items, and the models share fewer than two seeds"
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
    """Mean over seeds of `ours` minus that of `theirs`; `paired`: row by row."""
    if paired:
        return _estimate([ours.minus(theirs)], [1.0])
    return _estimate([ours, theirs], [1.0, -1.0])


def with_spread(entry: Mapping[str, Any]) -> Interval | None:
    """The interval of an entry of results over items and, if it has a spread, over seeds.

    It is slightly too wide, because the spread contains a part of the variance over items. None for
    an entry without a standard error.
    """
    stderr = finite(entry.get("stderr"))
    spread = finite(entry.get("spread"))
    runs = entry.get("runs", 1)
    value = finite(entry.get("value"))
    if value is None or stderr is None:
        return None
    of_items, of_seeds = stderr**2, (spread or 0.0) ** 2 / runs
    return student(value, [(of_items, math.inf), (of_seeds, runs - 1)])


def plain_average(folders: Sequence[Path]) -> Results:
    """As `ipt.evaluation.results.average`, for seeds with different items.

    The spread over seeds then includes the variance over items.
    """
    results = [load_results(folder) for folder in folders]
    averaged: Results = {}
    for task, metrics in results[0].items():
        for metric in metrics:
            entries = [result.get(task, {}).get(metric, {}) for result in results]
            values = [finite(entry.get("value")) for entry in entries]
            known = [value for value in values if value is not None]
            if len(known) == len(results):
                averaged.setdefault(task, {})[metric] = {
                    "value": float(np.mean(known)),
                    "stderr": None,
                    "ci95": [None, None],
                    "n": sum(entry["n"] for entry in entries),
                    "spread": float(np.std(known, ddof=1)) if len(known) > 1 else None,
                    "runs": len(known),
                }
    return averaged


def student(value: float, parts: Sequence[tuple[float, float]]) -> Interval:
    """The interval and p value of an estimate.

    `parts`: the parts of its variance, each with its degrees of freedom (infinite: normal).
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
    """The signed sum of the tables' means. The seeds of all tables share one variance."""
    items = tables[0].influences.shape[1]
    value = 0.0
    influence = np.zeros(items)
    between_seeds = residual = inverse_seeds = 0.0
    freedom = 0
    for table, sign in zip(tables, signs, strict=True):
        mean, mean_influence = table.values.mean(), table.influences.mean(0)
        value += sign * float(mean)
        influence += sign * mean_influence
        between_seeds += float(((table.values - mean) ** 2).sum())
        residual += float(((table.influences - mean_influence) ** 2).sum())
        inverse_seeds += 1 / len(table.values)
        freedom += len(table.values) - 1
    of_items = standard_error(influence) ** 2
    if freedom == 0:
        return student(value, [(of_items, math.inf)])
    weight = inverse_seeds / freedom
    of_seeds = weight * between_seeds
    of_both = weight * residual / (items * (items - 1)) if items > 1 else 0.0
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
