"""Metrics with confidence intervals, and paired differences between two models.

A metric is a smooth function of means over items. It stores the influence of each item on it (the
linearised contribution, with mean zero), from which paired differences follow: the standard error
of `a - b` is that of the mean of the differences of influences (delta method, "infinitesimal
jackknife").
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Metric:
    """A value over `n` items. `stderr` and `ci95` are NaN for a single item."""

    value: float
    stderr: float
    ci95: tuple[float, float]
    n: int
    influence: NDArray[np.float64]  # (n,)
    binary: bool = False  # the proportion of right items

    def as_dict(self) -> dict[str, Any]:
        """The entry in results.json, where unknown values are null."""
        return {
            "value": _known(self.value),
            "stderr": _known(self.stderr),
            "ci95": [_known(bound) for bound in self.ci95],
            "n": self.n,
        }


@dataclass(frozen=True)
class Difference:
    """`a - b` over the `n` items that both models answered; `p` is two-sided."""

    difference: float
    stderr: float
    ci95: tuple[float, float]
    p: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "difference": self.difference,
            "stderr": _known(self.stderr),
            "ci95": [_known(bound) for bound in self.ci95],
            "p": _known(self.p),
            "n": self.n,
        }


def mean(values: ArrayLike) -> Metric:
    """The mean of one number per item, with a normal interval."""
    x = _checked(values)
    return _normal(float(x.mean()), x - x.mean())


def proportion(right: ArrayLike) -> Metric:
    """The proportion of true items, with a Wilson interval."""
    x = _checked(right)
    assert np.isin(x, (0, 1)).all(), "a proportion needs values 0 and 1"
    share = float(x.mean())
    influence = x - share
    return Metric(
        share,
        standard_error(influence),
        wilson(int(x.sum()), len(x)),
        len(x),
        influence,
        binary=True,
    )


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Metric:
    """Sum of numerators over sum of denominators. Items are clusters, as the tokens of one document
    are not independent.
    """
    x, weight = _checked(numerators), _checked(denominators)
    assert len(x) == len(weight) and weight.sum() > 0, (
        "a ratio needs a positive denominator for its items"
    )
    value = float(x.sum() / weight.sum())
    return _normal(value, (x - value * weight) / weight.mean())


def ratio_or_nan(numerators: ArrayLike, denominators: ArrayLike) -> Metric:
    """As `ratio`, but NaN if the denominators are zero."""
    weights = np.asarray(denominators)
    return ratio(numerators, weights) if weights.sum() > 0 else mean(np.full(len(weights), np.nan))


def f1(answers: ArrayLike, gold: ArrayLike, average: str) -> Metric:
    """Mean F1 over the classes that occur, unweighted (`macro`) or by their frequency in `gold`
    (`weighted`), as scikit-learn's f1_score. Each item has one class, given as a number.
    """
    assert average in ("macro", "weighted")
    answered, right = np.asarray(answers), np.asarray(gold)
    classes = np.union1d(answered, right)[:, None]
    is_answer = (answered == classes).astype(np.float64)  # (classes, n)
    is_gold = (right == classes).astype(np.float64)
    total = (is_answer + is_gold).mean(1, keepdims=True)
    values = 2 * (is_answer * is_gold).mean(1, keepdims=True) / total
    influence = (2 * is_answer * is_gold - values * (is_answer + is_gold)) / total
    if average == "macro":
        weights = np.full_like(values, 1 / len(classes))
        combined = (weights * influence).sum(0)
    else:  # the weights are means over items too
        weights = is_gold.mean(1, keepdims=True)
        combined = (weights * influence + (is_gold - weights) * values).sum(0)
    return _normal(float((weights * values).sum()), combined)


def mean_of_groups(groups: Sequence[Any], measure: Callable[[list[int]], Metric]) -> Metric:
    """The unweighted mean of `measure` over groups of items, whose sizes are treated as fixed."""
    members: dict[Any, list[int]] = {}
    for item, group in enumerate(groups):
        members.setdefault(group, []).append(item)
    influence = np.zeros(len(groups))
    values = []
    for items in members.values():
        part = measure(items)
        influence[items] = part.influence * len(groups) / (len(items) * len(members))
        values.append(part.value)
    return _normal(float(np.mean(values)), influence)


def exponential(metric: Metric) -> Metric:
    """exp(metric), with the exponential of its interval, which is never negative."""
    with np.errstate(over="ignore"):  # infinite for a diverged model
        value, low, high = (float(np.exp(x)) for x in (metric.value, *metric.ci95))
    return Metric(value, value * metric.stderr, (low, high), metric.n, value * metric.influence)


def difference(a: Metric, b: Metric) -> Difference:
    """`a - b`, paired: item i of `a` is item i of `b`.

    p is from the normal approximation, for two proportions from the exact McNemar (sign) test on
    the items that only one of the models got right.
    """
    assert a.n == b.n, "paired metrics need the same items"
    value = a.value - b.value
    stderr = standard_error(a.influence - b.influence)
    p = _exact_p(a, b) if a.binary and b.binary else normal_p(value, stderr)
    return Difference(value, stderr, (value - Z95 * stderr, value + Z95 * stderr), p, a.n)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided exact p-value that `only_a` and `only_b` are equally likely."""
    from scipy.stats import binomtest

    n = only_a + only_b
    return float(binomtest(only_a, n).pvalue) if n else 1.0


def normal_p(value: float, stderr: float) -> float:
    """Two-sided p-value of `value` under a normal distribution around zero."""
    if stderr == 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value) / stderr / math.sqrt(2))


def standard_error(influence: NDArray[np.float64]) -> float:
    """Standard error of a value with these influences (n - 1 in the variance); NaN for one item."""
    n = len(influence)
    return math.nan if n < 2 else float(np.sqrt((influence**2).sum() / (n * (n - 1))))


def _normal(value: float, influence: NDArray[np.float64]) -> Metric:
    stderr = standard_error(influence)
    return Metric(
        value, stderr, (value - Z95 * stderr, value + Z95 * stderr), len(influence), influence
    )


def _exact_p(a: Metric, b: Metric) -> float:
    change = np.rint((a.influence + a.value) - (b.influence + b.value)).astype(int)
    return mcnemar(int((change > 0).sum()), int((change < 0).sum()))


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    assert x.ndim == 1 and len(x) > 0, "a metric needs one number for each of one or more items"
    return x


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
