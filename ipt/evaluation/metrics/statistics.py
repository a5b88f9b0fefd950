"""Figures with their uncertainty, and the difference between two models on the same items.

Every metric here is a smooth function of means over items. It is kept with what each item adds to
it (its influence: the linearised share of one item, with mean zero), because a paired difference
needs nothing else: the standard error of `a - b` is that of the mean of the differences of
influences (delta method, "infinitesimal jackknife").
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
    """A value over `n` items; `stderr` and `ci95` are NaN where one item alone says nothing about
    the spread.
    """

    value: float
    stderr: float
    ci95: tuple[float, float]
    n: int
    influence: NDArray[np.float64]  # (n,)
    binary: bool = False  # a share of items that are right

    def as_dict(self) -> dict[str, Any]:
        """The entry in results.json; what cannot be known is null there."""
        return {
            "value": _known(self.value),
            "stderr": _known(self.stderr),
            "ci95": [_known(bound) for bound in self.ci95],
            "n": self.n,
        }


@dataclass(frozen=True)
class Difference:
    """`a - b` over the `n` items that both models have answered; `p` is two-sided."""

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
    """The share of true items, with a Wilson interval."""
    x = _checked(right)
    assert np.isin(x, (0, 1)).all(), "a proportion is taken of right and wrong items"
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
    """Sum of numerators over sum of denominators, items being the clusters: tokens of one document
    are not independent.
    """
    x, weight = _checked(numerators), _checked(denominators)
    assert len(x) == len(weight) and weight.sum() > 0, (
        "a ratio needs a positive denominator for its items"
    )
    value = float(x.sum() / weight.sum())
    return _normal(value, (x - value * weight) / weight.mean())


def ratio_or_nan(numerators: ArrayLike, denominators: ArrayLike) -> Metric:
    """As `ratio`; not a number where there is nothing to divide by."""
    weights = np.asarray(denominators)
    return ratio(numerators, weights) if weights.sum() > 0 else mean(np.full(len(weights), np.nan))


def f1(answers: ArrayLike, gold: ArrayLike, average: str) -> Metric:
    """F1 of each class, averaged over the classes that occur: each the same (`macro`) or by its
    share of `gold` (`weighted`).

    One class (any number) for each item; the values are scikit-learn's f1_score.
    """
    assert average in ("macro", "weighted"), "an F1 of classes is averaged in one of two ways"
    answered, right = np.asarray(answers), np.asarray(gold)
    classes = np.union1d(answered, right)[:, None]
    # (classes, n)
    is_answer, is_gold = (
        (answered == classes).astype(np.float64),
        (right == classes).astype(np.float64),
    )
    total = (is_answer + is_gold).mean(1, keepdims=True)
    values = 2 * (is_answer * is_gold).mean(1, keepdims=True) / total
    influence = (2 * is_answer * is_gold - values * (is_answer + is_gold)) / total
    weights = (
        is_gold.mean(1, keepdims=True)
        if average == "weighted"
        else np.full_like(values, 1 / len(classes))
    )
    combined = (weights * influence).sum(0)
    if average == "weighted":  # the weights are means over items too
        combined += ((is_gold - weights) * values).sum(0)
    return _normal(float((weights * values).sum()), combined)


def mean_of_groups(groups: Sequence[Any], measure: Callable[[list[int]], Metric]) -> Metric:
    """The unweighted mean of what `measure` gives for the items of each group, whose sizes are
    taken as given.
    """
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
    """exp(metric): the interval is the exponential of the metric's interval, so never negative."""
    with np.errstate(over="ignore"):  # a diverged model has no finite perplexity
        value, low, high = (float(np.exp(x)) for x in (metric.value, *metric.ci95))
    return Metric(value, value * metric.stderr, (low, high), metric.n, value * metric.influence)


def difference(a: Metric, b: Metric) -> Difference:
    """`a - b`, paired: item i of `a` is item i of `b`.

    p is from the normal approximation; of two proportions it is the exact McNemar (sign) test on
    the items that only one of the two got right.
    """
    assert a.n == b.n, "paired metrics are of the same items"
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
    """Standard error of a value whose items have this influence (n - 1 in the variance); NaN for
    one item.
    """
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
    assert x.ndim == 1 and len(x) > 0, "a metric needs one number per item, and at least one item"
    return x


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
